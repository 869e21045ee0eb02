"""Raw rows from files, saved folders and the hub, streamed through `datasets`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from configs.schema.data import FilesSource, HubSource, SavedSource, Source
from kdflow_core.data.conversations import SampleError
from kdflow_core.errors import DataError


def iterate_rows(source: Source) -> Iterator[Mapping[str, Any] | SampleError]:
    """The rows of a source, in order; a SampleError in place of one that cannot be read.

    Raises DataError when the source itself cannot be opened.
    """
    try:
        rows = _open(source)
        iterator = iter(rows)
    except (FileNotFoundError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error) from error
    number = 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except (FileNotFoundError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise _unreadable(source, error) from error
        number += 1
        yield _parse_line(row["text"], source.path, number) if _is_jsonl(source) else row


def _is_jsonl(source: Source) -> bool:
    return isinstance(source, FilesSource) and source.resolved_format == "jsonl"


def _open(source: Source) -> Any:
    if isinstance(source, SavedSource):
        loaded = datasets.load_from_disk(source.path)
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(
                f"{source.path} holds several splits ({', '.join(loaded)}); "
                f"name one: {source.path}/{next(iter(loaded))}"
            )
        return loaded
    if isinstance(source, HubSource):
        return datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    # JSON lines are read as text, so that one broken line costs one sample and not the file.
    builder = "text" if _is_jsonl(source) else str(source.resolved_format)
    # `datasets` cannot stream text from every file system (datasets 5.2 hands s3fs the encoding as
    # an option of the session), so remote text is downloaded into its cache.
    streaming = builder != "text" or "://" not in source.path
    return datasets.load_dataset(
        builder, data_files={"train": source.path}, split="train", streaming=streaming
    )


def _parse_line(line: str, path: str, number: int) -> Mapping[str, Any] | SampleError:
    if not line.strip():
        return SampleError("blank_line", f"{path} line {number} is blank")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return SampleError("malformed", f"{path} line {number} is not JSON: {error}")
    if not isinstance(row, dict):
        return SampleError("malformed", f"{path} line {number} is not a JSON object")
    return row


def _unreadable(source: Source, error: Exception) -> DataError:
    return DataError(f"cannot read data source '{source.path}' ({source.type}): {error}")
