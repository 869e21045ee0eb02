"""Token sequences on disk: Arrow IPC files, memory-mapped by every rank.

One row is one sample. It has a sequence for each *view*, of the student and of each teacher that
reads another tokenization or template: ids, supervision mask, digests of media, and the digest of
all that, which ties teacher states to it. A view that is equal to the first one is null, and read
from there. A view may have an alignment with the first one: pairs of rows, spans of tokens. Where
the student has sampled the answer, `sampled_log_prob` has the log-probability of each supervised
token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import StoreCorruptError
from storage.store import disk_errors

VIEWS = ("student", "teacher")
_VIEWS_KEY = b"kdflow.views"
# Of each view: what it consists of, and how it is aligned with the first one.
_PARTS = {
    "ids": pa.list_(pa.int32()),
    "supervised": pa.list_(pa.bool_()),
    "media": pa.list_(pa.binary(16)),
    "digest": pa.binary(16),
}
_ALIGNMENT = {"pairs": pa.list_(pa.int32()), "spans": pa.list_(pa.int32())}


def token_schema(views: Sequence[str]) -> pa.Schema:
    """The columns of a table whose samples have these views."""
    fields = [("source", pa.string())]
    for number, view in enumerate(views):
        parts = _PARTS | (_ALIGNMENT if number else {})
        fields += [(f"{view}_{part}", kind) for part, kind in parts.items()]
    fields += [("label", pa.string()), ("sampled_log_prob", pa.list_(pa.float32()))]
    return pa.schema(fields, metadata={_VIEWS_KEY: json.dumps(list(views)).encode()})


ROWS_PER_BATCH = 1024


class TokenWriter:
    """Streams samples into one Arrow file; use as a context manager."""

    def __init__(self, path: Path, views: Sequence[str] = VIEWS) -> None:
        self._path = path
        self._views = tuple(views)
        self._schema = token_schema(views)
        self._rows: list[Mapping[str, Any]] = []
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self.num_rows = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; the keys are those of the schema. What is missing is null, and a view
        that is the first one again is stored once.
        """
        first, *others = self._views
        again = {
            f"{view}_{part}": None
            for view in others
            if _is_equal(row, first, view)
            for part in _PARTS
        }
        self._rows.append({**row, **again})
        self.num_rows += 1
        if len(self._rows) >= ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        with disk_errors(str(self._path)):
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._flush()
        with disk_errors(str(self._path)):
            self._writer.close()
            self._file.close()


class TokenTable(Sequence[Mapping[str, Any]]):
    """The sequences of one file, read by index without loading it."""

    def __init__(self, path: Path) -> None:
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise StoreCorruptError(f"{path} is not an Arrow file: {error}") from error
        names = (self._table.schema.metadata or {}).get(_VIEWS_KEY)
        if names is None:
            raise StoreCorruptError(f"{path} is not a token table: it does not name its views")
        self.views: tuple[str, ...] = tuple(json.loads(names))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:  # type: ignore[override]
        """Row `index`, with all of its views: numpy arrays for the lists (media: a list of bytes),
        bytes for the digests, text for the rest.
        """
        row: dict[str, Any] = {}
        for name in self._table.column_names:
            scalar = self._table.column(name)[index]
            plain = pa.types.is_list(scalar.type) and pa.types.is_primitive(scalar.type.value_type)
            is_array = plain and scalar.is_valid
            row[name] = scalar.values.to_numpy(zero_copy_only=False) if is_array else scalar.as_py()
        first, *others = self.views
        for view in others:
            if row[f"{view}_ids"] is None:
                row |= {f"{view}_{part}": row[f"{first}_{part}"] for part in _PARTS}
        return row

    def lengths(self, view: str) -> np.ndarray:
        """Tokens of each sample in a view. Shape [num_samples]."""
        return self._of_view(view, self._stored_lengths)

    def supervised_counts(self, view: str) -> np.ndarray:
        """Supervised tokens of each sample in a view. Shape [num_samples]."""
        return self._of_view(view, self._stored_counts)

    def digests(self, view: str = "teacher") -> np.ndarray:
        """The digest of each sample in a view: uint8 [num_samples, 16]."""
        return self._of_view(view, self._stored_digests)

    def _of_view(self, view: str, stored: Callable[[str], np.ndarray]) -> np.ndarray:
        """Something of every sample in a view: where that is the first one again, of this."""
        own = stored(view)
        again = self._table.column(f"{view}_ids").is_null().to_numpy()
        if again.any():
            own = own.copy()
            own[again] = stored(self.views[0])[again]
        return own

    def _stored_lengths(self, view: str) -> np.ndarray:
        lengths = pc.list_value_length(self._table.column(f"{view}_ids")).fill_null(0).to_numpy()
        return np.asarray(lengths, dtype=np.int64)

    def _stored_counts(self, view: str) -> np.ndarray:
        counts = [np.zeros(0, np.int64)]
        for chunk in self._table.column(f"{view}_supervised").chunks:  # never all tokens at once
            flat = chunk.flatten().to_numpy(zero_copy_only=False)
            running = np.concatenate([[0], np.cumsum(flat, dtype=np.int64)])
            lengths = pc.list_value_length(chunk).fill_null(0).to_numpy()
            ends = np.cumsum(lengths, dtype=np.int64)
            counts.append(running[ends] - running[ends - lengths])
        return np.concatenate(counts)

    def _stored_digests(self, view: str) -> np.ndarray:
        chunks = [
            np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 16)[
                chunk.offset : chunk.offset + len(chunk)
            ]
            for chunk in self._table.column(f"{view}_digest").chunks
        ]
        return np.concatenate([np.empty((0, 16), np.uint8), *chunks])

    def sources(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The number of each row's data source (int16), and the sources' names by number."""
        column = self._table.column("source").combine_chunks().dictionary_encode()
        return column.indices.to_numpy().astype(np.int16), tuple(column.dictionary.to_pylist())


def _is_equal(row: Mapping[str, Any], first: str, view: str) -> bool:
    """Whether a view of a row to be written is the first one again."""
    return all(
        np.array_equal(row.get(f"{first}_{part}", ()), row.get(f"{view}_{part}", ()))
        for part in ("ids", "supervised", "media")
    ) and row.get(f"{first}_digest") == row.get(f"{view}_digest")
