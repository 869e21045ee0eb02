"""Token sequences on disk: Arrow IPC files, memory-mapped by every rank.

One row is one sequence: ids and supervision mask for the student and for the teacher (they differ
when the chat templates do), and the digest that ties teacher states to it. Where the student has
sampled the answer, `sampled_log_prob` has the log-probability of each supervised token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import StoreCorruptError
from storage.store import disk_errors

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("digest", pa.binary(16)),
        ("student_ids", pa.list_(pa.int32())),
        ("student_supervised", pa.list_(pa.bool_())),
        ("teacher_ids", pa.list_(pa.int32())),
        ("teacher_supervised", pa.list_(pa.bool_())),
        ("answer", pa.string()),
        ("sampled_log_prob", pa.list_(pa.float32())),
    ]
)
ROWS_PER_BATCH = 1024


class TokenWriter:
    """Streams sequences into one Arrow file; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self.num_rows = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; the keys are those of SCHEMA. What is missing is null."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) >= ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        with disk_errors(str(self._path)):
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
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

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:  # type: ignore[override]
        """Row `index`: numpy arrays for the lists, bytes for the digest, text for the rest."""
        row = {}
        for name in self._table.column_names:
            scalar = self._table.column(name)[index]
            is_list = pa.types.is_list(scalar.type) and scalar.is_valid
            row[name] = scalar.values.to_numpy(zero_copy_only=False) if is_list else scalar.as_py()
        return row

    def lengths(self, side: str) -> np.ndarray:
        """Tokens of each sequence, `side` being student or teacher. Shape [num_sequences]."""
        return self._list_lengths(f"{side}_ids")

    def _list_lengths(self, column: str) -> np.ndarray:
        lengths = pc.list_value_length(self._table.column(column)).to_numpy()
        return np.asarray(lengths, dtype=np.int64)

    def supervised_counts(self, side: str) -> np.ndarray:
        """Supervised tokens of each sequence. Shape [num_sequences]."""
        counts = [np.zeros(0, np.int64)]
        for chunk in self._table.column(f"{side}_supervised").chunks:  # never all tokens at once
            flat = chunk.flatten().to_numpy(zero_copy_only=False)
            running = np.concatenate([[0], np.cumsum(flat, dtype=np.int64)])
            lengths = pc.list_value_length(chunk).to_numpy()
            ends = np.cumsum(lengths, dtype=np.int64)
            counts.append(running[ends] - running[ends - lengths])
        return np.concatenate(counts)

    def digests(self) -> np.ndarray:
        """The digest of each row's teacher sequence: uint8 [num_sequences, 16]."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 16)[
                chunk.offset : chunk.offset + len(chunk)
            ]
            for chunk in self._table.column("digest").chunks
        ]
        return np.concatenate([np.empty((0, 16), np.uint8), *chunks])

    def sources(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The number of each row's data source (int16), and the sources' names by number."""
        column = self._table.column("source").combine_chunks().dictionary_encode()
        return column.indices.to_numpy().astype(np.int16), tuple(column.dictionary.to_pylist())
