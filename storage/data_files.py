"""Data files as rows: the lines or rows in each file."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from configs.patience import is_transient
from storage.listing import DataFileError, file_system, list_files

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28
ROWS_PER_BATCH = 256
BOM = b"\xef\xbb\xbf"
ARROW_FILE_MAGIC = b"ARROW1"


class DataFiles:
    """The rows of data files on any file system; satisfies the core's `RowFiles`."""

    def list(self, pattern: str) -> list[str]:
        """Paths, or URLs, of the files that a path, glob or URL names. Raises DataFileError."""
        fs, _ = file_system(pattern)
        paths = list_files(pattern)
        local = isinstance(fs, LocalFileSystem)
        return paths if local else [fs.unstrip_protocol(path) for path in paths]

    def lines(self, url: str) -> Iterator[bytes | None]:
        """The lines of a file without their ends, decompressed by its suffix (.gz, .bz2, .zst,
        .lz4); None in place of one above `MAX_LINE_BYTES`.

        Raises DataFileError, with the line that was reached, for what is cut or damaged.
        """
        number = 0
        try:
            with _open(url) as raw:
                for line in _split(_decompressed(raw, url)):
                    number += 1
                    yield line.removeprefix(BOM) if line and number == 1 else line
        except (OSError, EOFError, pa.ArrowException) as error:
            raise _broken(f"cannot read {url} behind line {number}", error) from error

    def rows(self, url: str, format_: str) -> Iterator[dict[str, Any] | str]:
        """The rows of a `parquet` or `arrow` file; text in place of one that holds no valid text.

        Raises DataFileError.
        """
        number = 0
        try:
            with _open(url) as raw:
                for batch in _parquet(raw) if format_ == "parquet" else _arrow(raw):
                    for row in _rows_of(batch):
                        number += 1
                        yield row
        except (OSError, EOFError, pa.ArrowException) as error:
            raise _broken(f"cannot read {url} behind row {number}", error) from error


def _broken(what: str, error: Exception) -> DataFileError:
    """Reading has ended; where that may pass, the stage is worth a second attempt."""
    broken = DataFileError(f"{what}: {error}")
    broken.expected = getattr(error, "expected", not is_transient(error))
    return broken


def _open(url: str) -> Any:
    fs, path = file_system(url)
    return fs.open(path, "rb")


def _decompressed(raw: Any, url: str) -> Any:
    codec = next((c for end, c in _CODECS.items() if url.endswith(end)), None)
    if codec is None:
        return raw
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def _split(stream: Any) -> Iterator[bytes | None]:
    """Lines of a binary stream; never more than `MAX_LINE_BYTES` and a chunk in memory."""
    rest, too_long = b"", False
    while chunk := stream.read(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield None if too_long else line.removesuffix(b"\r")
            too_long = False
        if len(rest) > MAX_LINE_BYTES:
            rest, too_long = b"", True
    if rest or too_long:
        yield None if too_long else rest.removesuffix(b"\r")


def _parquet(raw: Any) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(raw).iter_batches(batch_size=ROWS_PER_BATCH)


def _arrow(raw: Any) -> Iterator[pa.RecordBatch]:
    """The tables of an IPC file, or of an IPC stream, which is what `datasets` writes."""
    is_file = raw.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    raw.seek(0)
    if is_file:
        reader = pa.ipc.open_file(raw)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(raw)


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # one row's text is broken: find it
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield str(error)
