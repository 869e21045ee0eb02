"""Raw rows of data sources, in order: files through a `RowFiles`, the rest through `dataset_rows`.

A row that cannot be read is lost alone, and reported with its file and number.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from configs.schema.data import FilesSource, Source
from kdflow_core.data.messages import SampleError
from kdflow_core.errors import DataError

Row = Mapping[str, Any] | SampleError
MAX_ARRAY_BYTES = 1 << 30


class RowFiles(Protocol):
    """Files of rows on any file system. What cannot be read raises OSError, which names it."""

    def list(self, pattern: str) -> list[str]:
        """The files that a path, glob or URL names."""
        ...

    def lines(self, url: str) -> Iterator[bytes | None]:
        """The lines of a file; None in place of one that is too long to hold."""
        ...

    def rows(self, url: str, format_: str) -> Iterator[dict[str, Any] | str]:
        """The rows of a `parquet` or `arrow` file; text in place of one that is broken."""
        ...


def iterate_rows(source: Source, files: RowFiles) -> Iterator[Row]:
    """The rows of a source, in order; a SampleError in place of one that cannot be read.

    Raises DataError when the source itself cannot be opened, or breaks off.
    """
    try:
        if isinstance(source, FilesSource):
            yield from _rows_of_files(source, files)
        else:
            from kdflow_core.data.dataset_rows import dataset_rows  # noqa: PLC0415 - half a second

            yield from dataset_rows(source)
    except (ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"cannot read data source '{source.path}' ({source.type}): {error}"
        ) from error


def _rows_of_files(source: FilesSource, files: RowFiles) -> Iterator[Row]:
    kind = source.resolved_format
    for url in files.list(source.path):
        if kind == "jsonl":
            yield from _json_rows(url, files)
            continue
        for number, row in enumerate(files.rows(url, str(kind)), start=1):
            if isinstance(row, str):
                yield SampleError("malformed", f"{url} row {number} is not text: {row}")
            else:
                yield row


def _json_rows(url: str, files: RowFiles) -> Iterator[Row]:
    """The rows of a file of JSON lines, or of one JSON array of objects."""
    lines = enumerate(files.lines(url), start=1)
    head: list[tuple[int, bytes | None]] = []
    for number, line in lines:
        head.append((number, line))
        if line is None or line.strip():
            break
    if head and (head[-1][1] or b"").lstrip().startswith(b"["):
        taken = _take(lines, head)
        rows = _array(b"\n".join(line or b"" for _, line in taken), url)
        if rows is not None:
            for number, row in enumerate(rows, start=1):
                yield _as_row(row, f"{url} element {number}")
            return
        head = taken
    for number, line in (*head, *lines):
        yield _parse_line(line, f"{url} line {number}")


def _take(
    lines: Iterable[tuple[int, bytes | None]], head: list[tuple[int, bytes | None]]
) -> list[tuple[int, bytes | None]]:
    """The rest of a file that may be one JSON array. Raises DataError for one that is too large."""
    taken, size = list(head), 0
    for number, line in lines:
        taken.append((number, line))
        size += len(line or b"")
        if size > MAX_ARRAY_BYTES:
            raise DataError(
                f"a JSON array of more than {MAX_ARRAY_BYTES:,} bytes; write it as JSON lines"
            )
    return taken


def _array(data: bytes, url: str) -> list[Any] | None:
    """The elements, or None where this is no JSON array of objects."""
    value = _json(data, url)
    is_rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return value if is_rows else None


def _parse_line(line: bytes | None, where: str) -> Row:
    if line is None:
        return SampleError("malformed", f"{where} is too long to be a sample")
    if not line.strip():
        return SampleError("blank_line", f"{where} is blank")
    value = _json(line, where)
    return value if isinstance(value, SampleError) else _as_row(value, where)


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        return SampleError("malformed", f"{where} is not a JSON object")
    return value


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SampleError("malformed", f"{where} is not UTF-8: {error.reason}")
    except RecursionError:
        return SampleError("malformed", f"{where} is nested too deeply")
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        return SampleError("malformed", f"{where} is not JSON: {error}")
