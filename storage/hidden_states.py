"""Teacher hidden states in zarr v3: written once, in one pass, and read by sequence digest.

Layout of the artifact's folder:

- `states.zarr/hidden`: uint16 [K, S, H], the bits of bfloat16, one shard object per S rows;
- `states.zarr/target_ids`: int32 [K, S], the token that each row predicts;
- `commits/<shard>.json`: written after a shard's data, with its rows and XXH3-128;
- `index/<shard>.parquet`, at the end compacted to `index.parquet`: per sequence its digest, first
  row, number of rows and XXH3-64 of the rows.

Sequences are packed back to back over the K*S rows and may straddle shards. Where each one goes
follows from the row counts alone, which are known before the teacher runs: a writer that died is
continued at its first missing shard.

Dimensions: N rows of a sequence, H hidden size, K shards, S rows of a shard, C rows of a chunk.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zarr
import zarr.codecs
import zarr.storage

from storage.artifact import ArtifactRef
from storage.errors import RowsMismatchError, StoreCorruptError, StoreError
from storage.store import ArtifactStore, disk_errors

ROW_BYTES_PER_VALUE = 2
INDEX_SCHEMA = pa.schema(
    [
        ("digest", pa.binary(16)),
        ("first_row", pa.int64()),
        ("num_rows", pa.int32()),
        ("rows_xxh3", pa.uint64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the arrays, in rows."""

    hidden_size: int
    num_rows: int
    shard_rows: int
    chunk_rows: int

    @property
    def num_shards(self) -> int:
        """K: the shards that hold `num_rows` rows, at least one."""
        return max(1, math.ceil(self.num_rows / self.shard_rows))

    @property
    def num_bytes(self) -> int:
        """What the rows take on disk, in bytes, without index and checksums."""
        return self.num_rows * (self.hidden_size * ROW_BYTES_PER_VALUE + 4)


def plan_layout(
    *, hidden_size: int, num_rows: int, shard_rows: int | None, chunk_rows: int | None
) -> Layout:
    """Shards of about 64 MiB in chunks of about 512 KiB, both powers of two in rows."""
    row_bytes = ROW_BYTES_PER_VALUE * hidden_size
    chunk = 2 ** round(math.log2((512 << 10) / row_bytes))
    shard = 2 ** round(math.log2((64 << 20) / row_bytes))
    chunk = min(max(chunk, 32), 256)
    return Layout(
        hidden_size=hidden_size,
        num_rows=num_rows,
        shard_rows=shard_rows or max(shard, chunk),
        chunk_rows=chunk_rows or chunk,
    )


@dataclass(frozen=True, kw_only=True)
class StoredSequence:
    """One sequence to be stored: its digest (16 bytes) and how many rows it has."""

    digest: bytes
    num_rows: int


class HiddenStateWriter:
    """Streams the rows of planned sequences into shards, one shard in memory at a time."""

    def __init__(
        self,
        *,
        store: ArtifactStore,
        kind: str,
        digest: str,
        layout: Layout,
        sequences: Sequence[StoredSequence],
    ) -> None:
        if sum(s.num_rows for s in sequences) != layout.num_rows:
            raise StoreError("the sequences' rows do not add up to the layout's")
        self.layout = layout
        self._store = store
        self._folder = store.folder(kind, digest)
        self._sequences = sequences
        self._first_rows = np.cumsum([0, *(s.num_rows for s in sequences)])
        self._hidden, self._targets = _open_arrays(store, kind, digest, layout)
        self.num_committed = self._count_committed()
        start = self.num_committed * layout.shard_rows
        # The first sequence that has rows at or behind `start`; it may begin in a finished shard.
        ends = self._first_rows[1:]
        self.next_sequence = int(np.searchsorted(ends, start, side="right"))
        self._shard = self.num_committed
        self._buffer_SH = np.zeros((layout.shard_rows, layout.hidden_size), np.uint16)
        self._target_S = np.zeros(layout.shard_rows, np.int32)
        self._ended: list[tuple[bytes, int, int, int]] = []

    def _count_committed(self) -> int:
        """Shards, from the first on, whose data are as their commit records say."""
        for shard in range(self.layout.num_shards):
            try:
                record = json.loads(self._store.fs.cat_file(self._commit_path(shard)))
            except FileNotFoundError:
                return shard
            if record["num_bytes"] != self._shard_bytes(shard):
                return shard
        return self.layout.num_shards

    def _shard_objects(self, shard: int) -> list[str]:
        """The paths of a shard's objects that exist; zarr leaves out one of nothing but zeros."""
        names = (f"hidden/c/{shard}/0/0", f"target_ids/c/{shard}/0")
        paths = [f"{self._folder}/states.zarr/{name}" for name in names]
        return [path for path in paths if self._store.fs.exists(path)]

    def _shard_bytes(self, shard: int) -> int:
        return sum(self._store.fs.size(path) for path in self._shard_objects(shard))

    def _commit_path(self, shard: int) -> str:
        return f"{self._folder}/commits/{shard:05d}.json"

    def add(self, hidden_NH: np.ndarray, target_ids_N: np.ndarray) -> None:
        """Store the rows (bfloat16 bits, uint16) of sequence number `next_sequence`."""
        sequence = self._sequences[self.next_sequence]
        if hidden_NH.shape != (sequence.num_rows, self.layout.hidden_size):
            raise StoreError(
                f"sequence {self.next_sequence} was planned with {sequence.num_rows} rows of "
                f"{self.layout.hidden_size}, the teacher gave {hidden_NH.shape}"
            )
        first = int(self._first_rows[self.next_sequence])
        self._ended.append((sequence.digest, first, sequence.num_rows, hash_rows(hidden_NH)))
        done = max(0, self._shard * self.layout.shard_rows - first)
        while done < sequence.num_rows:
            offset = first + done - self._shard * self.layout.shard_rows
            count = min(sequence.num_rows - done, self.layout.shard_rows - offset)
            self._buffer_SH[offset : offset + count] = hidden_NH[done : done + count]
            self._target_S[offset : offset + count] = target_ids_N[done : done + count]
            done += count
            if offset + count == self.layout.shard_rows:
                # A sequence that goes on into the next shard is indexed there.
                self._write_shard(self.layout.shard_rows, keep_last=done < sequence.num_rows)
        self.next_sequence += 1

    def _write_shard(self, num_rows: int, *, keep_last: bool) -> None:
        shard = self._shard
        carried = [self._ended.pop()] if keep_last else []
        # zarr reads a shard before it overwrites it, and fails on what a crash left of it.
        for path in self._shard_objects(shard):
            self._store.fs.rm_file(path)
        with disk_errors(self._folder):
            self._hidden[shard] = self._buffer_SH
            self._targets[shard] = self._target_S
        self._write_parquet(f"index/{shard:05d}.parquet", _index_table(self._ended))
        record = {
            "rows": num_rows,
            "num_bytes": self._shard_bytes(shard),
            "hidden_xxh3_128": xxhash.xxh3_128_hexdigest(self._buffer_SH[:num_rows].data),
        }
        self._store.write_whole(self._commit_path(shard), json.dumps(record).encode())
        self._ended = carried
        self._buffer_SH[:] = 0
        self._target_S[:] = 0
        self._shard += 1

    def _write_parquet(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self._store.write_whole(f"{self._folder}/{name}", sink.getvalue())

    def close(self) -> None:
        """Write the last shard and the compacted index. All sequences must have been added."""
        if self.next_sequence != len(self._sequences):
            raise StoreError(
                f"{len(self._sequences) - self.next_sequence} planned sequences were not written"
            )
        rest = self.layout.num_rows - self._shard * self.layout.shard_rows
        if self._shard < self.layout.num_shards:
            self._write_shard(rest, keep_last=False)
        parts = [
            pq.read_table(
                io.BytesIO(self._store.fs.cat_file(f"{self._folder}/index/{k:05d}.parquet"))
            )
            for k in range(self.layout.num_shards)
        ]
        self._write_parquet("index.parquet", pa.concat_tables(parts))


class HiddenStateReader:
    """Gives the rows of a sequence to whoever can show the sequence's digest and target ids."""

    def __init__(self, *, store: ArtifactStore, ref: ArtifactRef) -> None:
        folder = store.folder(ref.kind, ref.digest)
        info = store.manifest(ref.kind, ref.digest).info
        self.layout = Layout(**info["layout"])
        self._hidden, self._targets = _open_arrays(store, ref.kind, ref.digest, self.layout)
        index = pq.read_table(io.BytesIO(store.fs.cat_file(f"{folder}/index.parquet")))
        digests = index.column("digest").to_pylist()
        keys = np.array([_short_key(digest) for digest in digests], np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._digests = [digests[i] for i in order]
        self._first = index.column("first_row").to_numpy()[order]
        self._count = index.column("num_rows").to_numpy()[order]
        self._hash = index.column("rows_xxh3").to_numpy()[order]

    def __len__(self) -> int:
        return len(self._digests)

    def rows(self, digest: bytes, target_ids_N: np.ndarray) -> np.ndarray:
        """The bfloat16 bits [N, H] of one sequence's states.

        Raises:
            RowsMismatchError: no such digest, or the rows predict other tokens than `target_ids_N`.
            StoreCorruptError: the rows are not the ones that were written.
        """
        entry = self._entry(digest)
        first, count = int(self._first[entry]), int(self._count[entry])
        targets = self._span(self._targets, first, count)
        if not np.array_equal(targets, target_ids_N):
            raise RowsMismatchError(
                f"the {count} stored rows of sequence {digest.hex()} predict other tokens than the "
                f"{len(target_ids_N)} of the student's sequence; run the extract stage again"
            )
        hidden_NH = self._span(self._hidden, first, count)
        if hash_rows(hidden_NH) != int(self._hash[entry]):
            raise StoreCorruptError(
                f"the stored rows of sequence {digest.hex()} are not those that were written; "
                "delete the artifact and run the extract stage again"
            )
        return hidden_NH

    def _entry(self, digest: bytes) -> int:
        position = int(np.searchsorted(self._keys, np.uint64(_short_key(digest))))
        while position < len(self._keys) and self._digests[position] != digest:
            position += 1
            if position < len(self._keys) and int(self._keys[position]) != _short_key(digest):
                break
        if position == len(self._keys) or self._digests[position] != digest:
            raise RowsMismatchError(
                f"no teacher states for the sequence with digest {digest.hex()}: its ids or its "
                "supervision mask differ from what the teacher saw; run the extract stage again"
            )
        return position

    def _span(self, array: Any, first: int, count: int) -> np.ndarray:
        size = self.layout.shard_rows
        parts = []
        for shard in range(first // size, (first + max(count, 1) - 1) // size + 1):
            start = max(first - shard * size, 0)
            stop = min(first + count - shard * size, size)
            try:
                parts.append(np.asarray(array[shard, start:stop]))
            except ValueError as error:  # zarr's checksum errors are bare ValueErrors
                raise StoreCorruptError(
                    f"shard {shard} cannot be read: {error}; delete the artifact and run the "
                    "extract stage again"
                ) from error
        return np.concatenate(parts)


def hash_rows(hidden_NH: np.ndarray) -> int:
    """XXH3-64 over the rows' bytes."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(hidden_NH).data)


def _short_key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _index_table(rows: list[tuple[bytes, int, int, int]]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(INDEX_SCHEMA.names, row, strict=True)) for row in rows], schema=INDEX_SCHEMA
    )


def _open_arrays(store: ArtifactStore, kind: str, digest: str, layout: Layout) -> tuple[Any, Any]:
    """The arrays `hidden` and `target_ids`, created when absent."""
    zarr_store: Any
    if store.is_local:
        zarr_store = zarr.storage.LocalStore(f"{store.folder(kind, digest)}/states.zarr")
    else:
        zarr_store = zarr.storage.FsspecStore.from_url(f"{store.uri(kind, digest)}/states.zarr")
    with disk_errors(store.folder(kind, digest)):
        group: Any = zarr.open_group(zarr_store, mode="a")
        shape = (layout.num_shards, layout.shard_rows, layout.hidden_size)
        if "target_ids" not in group:  # created last
            attributes = {"logical_dtype": "bfloat16", "meaning": "row i predicts target_ids[i]"}
            _create(group, "hidden", shape, layout.chunk_rows, "uint16", attributes)
            _create(group, "target_ids", shape[:2], layout.chunk_rows, "int32", {})
    if group["hidden"].shape != shape:
        raise StoreCorruptError(
            f"{store.uri(kind, digest)} holds an array of {group['hidden'].shape}, expected "
            f"{shape}; delete that folder and run again"
        )
    return group["hidden"], group["target_ids"]


def _create(
    group: Any,
    name: str,
    shape: tuple[int, ...],
    chunk_rows: int,
    dtype: str,
    attrs: dict[str, str],
) -> None:
    group.create_array(
        name,
        shape=shape,
        chunks=(1, chunk_rows, *shape[2:]),
        shards=(1, *shape[1:]),
        dtype=dtype,
        compressors=[zarr.codecs.Crc32cCodec()],  # raw values; a flipped bit raises on read
        filters=None,
        serializer="auto",
        attributes=attrs,
        overwrite=True,
    )
