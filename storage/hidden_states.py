"""Teacher hidden states in zarr v3: written once, by any number of processes, and read by digest.

Layout of the artifact's folder:

- `states.zarr/hidden`: uint16 [K, S, H], the bits of bfloat16, one shard object per S rows;
- `states.zarr/target_ids`: int32 [K, S], the token that each row predicts;
- `commits/<shard>.json`: written after a shard's data, with its rows and XXH3-128;
- `index/<shard>.parquet`, at the end compacted to `index.parquet`: per sequence its digest, first
  row, number of rows and XXH3-64 of the rows.

A shard holds whole sequences, back to back. Where each one goes follows from the row counts alone,
which are known before the teacher runs: whoever has the plan can write any shard, and a writer that
died costs the shard it was at.

Dimensions: N rows of a sequence, H hidden size, K shards, S rows of a shard, C rows of a chunk.
"""

import contextlib
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
import zarr.errors
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
    """Sizes of the arrays, in rows. A shard holds whole sequences, so its end may be padding."""

    hidden_size: int
    num_rows: int
    num_shards: int
    shard_rows: int
    chunk_rows: int

    @property
    def num_bytes(self) -> int:
        """What the rows take on disk, in bytes, without index and checksums."""
        return self.num_rows * (self.hidden_size * ROW_BYTES_PER_VALUE + 4)


@dataclass(frozen=True, kw_only=True)
class StoredSequence:
    """One sequence to be stored: its digest (16 bytes) and how many rows it has."""

    digest: bytes
    num_rows: int


def plan_layout(
    *,
    hidden_size: int,
    sequences: Sequence[StoredSequence],
    shard_rows: int | None,
    chunk_rows: int | None,
) -> Layout:
    """Shards of about 64 MiB in chunks of about 512 KiB, both powers of two in rows; larger shards
    where one sequence needs them.
    """
    row_bytes = ROW_BYTES_PER_VALUE * hidden_size
    chunk = chunk_rows or min(max(2 ** round(math.log2((512 << 10) / row_bytes)), 32), 256)
    shard = shard_rows or max(2 ** round(math.log2((64 << 20) / row_bytes)), chunk)
    longest = max((s.num_rows for s in sequences), default=0)
    shard = max(shard, math.ceil(longest / chunk) * chunk)
    shards = _assign(sequences, shard)
    return Layout(
        hidden_size=hidden_size,
        num_rows=sum(s.num_rows for s in sequences),
        num_shards=len(shards),
        shard_rows=shard,
        chunk_rows=chunk,
    )


def _assign(sequences: Sequence[StoredSequence], shard_rows: int) -> list[range]:
    """The sequences of each shard: as many as fit, in order. At least one shard."""
    shards, begin, rows = [], 0, 0
    for number, sequence in enumerate(sequences):
        if rows + sequence.num_rows > shard_rows:
            shards.append(range(begin, number))
            begin, rows = number, 0
        rows += sequence.num_rows
    return [*shards, range(begin, len(sequences))]


class HiddenStateWriter:
    """Writes planned sequences, a whole shard at a time, in any order and from any process.

    Every process that has the same plan addresses the same shards; they agree among themselves on
    who writes which.
    """

    def __init__(
        self,
        *,
        store: ArtifactStore,
        kind: str,
        digest: str,
        layout: Layout,
        sequences: Sequence[StoredSequence],
    ) -> None:
        self.layout = layout
        self._shards = _assign(sequences, layout.shard_rows)
        rows = sum(s.num_rows for s in sequences)
        if (len(self._shards), rows) != (layout.num_shards, layout.num_rows):
            raise StoreError("the layout was not planned for these sequences")
        self._store = store
        self._folder = store.folder(kind, digest)
        self._sequences = sequences
        self._hidden, self._targets = _open_arrays(store, kind, digest, layout)

    def sequences_of(self, shard: int) -> range:
        """The numbers of a shard's sequences."""
        return self._shards[shard]

    def missing_shards(self) -> list[int]:
        """Shards that are not committed, or whose data are not as their commit record says."""
        return [k for k in range(self.layout.num_shards) if not self._is_committed(k)]

    def _is_committed(self, shard: int) -> bool:
        try:
            record = json.loads(self._store.fs.cat_file(self._commit_path(shard)))
        except FileNotFoundError:
            return False
        return bool(record["num_bytes"] == self._shard_bytes(shard))

    def _shard_objects(self, shard: int) -> list[str]:
        """The paths of a shard's objects that exist; zarr leaves out one of nothing but zeros."""
        names = (f"hidden/c/{shard}/0/0", f"target_ids/c/{shard}/0")
        paths = [f"{self._folder}/states.zarr/{name}" for name in names]
        return [path for path in paths if self._store.fs.exists(path)]

    def _shard_bytes(self, shard: int) -> int:
        return sum(self._store.fs.size(path) for path in self._shard_objects(shard))

    def _commit_path(self, shard: int) -> str:
        return f"{self._folder}/commits/{shard:05d}.json"

    def write_shard(
        self, shard: int, hidden: Sequence[np.ndarray], target_ids: Sequence[np.ndarray]
    ) -> None:
        """Write and commit a shard: for each of its sequences the rows [N, H] (bfloat16 bits,
        uint16) and the token that each predicts [N].
        """
        numbers = self._shards[shard]
        buffer_SH = np.zeros((self.layout.shard_rows, self.layout.hidden_size), np.uint16)
        target_S = np.zeros(self.layout.shard_rows, np.int32)
        index, row = [], 0
        for number, hidden_NH, target_ids_N in zip(numbers, hidden, target_ids, strict=True):
            sequence = self._sequences[number]
            if hidden_NH.shape != (sequence.num_rows, self.layout.hidden_size):
                raise StoreError(
                    f"sequence {number} was planned with {sequence.num_rows} rows of "
                    f"{self.layout.hidden_size}, the teacher gave {hidden_NH.shape}"
                )
            rows = slice(row, row + sequence.num_rows)
            buffer_SH[rows], target_S[rows] = hidden_NH, target_ids_N
            first = shard * self.layout.shard_rows + row
            index.append((sequence.digest, first, sequence.num_rows, hash_rows(hidden_NH)))
            row += sequence.num_rows
        # zarr reads a shard before it overwrites it, and fails on what a crash left of it.
        for path in self._shard_objects(shard):
            self._store.fs.rm_file(path)
        with disk_errors(self._folder):
            self._hidden[shard] = buffer_SH
            self._targets[shard] = target_S
        self._write_parquet(f"index/{shard:05d}.parquet", _index_table(index))
        record = {
            "rows": row,
            "num_bytes": self._shard_bytes(shard),
            "hidden_xxh3_128": xxhash.xxh3_128_hexdigest(buffer_SH[:row].data),
        }
        self._store.write_whole(self._commit_path(shard), json.dumps(record).encode())

    def _write_parquet(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self._store.write_whole(f"{self._folder}/{name}", sink.getvalue())

    def close(self) -> None:
        """Write the compacted index. All shards must be there."""
        missing = self.missing_shards()
        if missing:
            raise StoreError(
                f"{len(missing)} of {self.layout.num_shards} planned shards were not written"
            )
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
        shard, start = divmod(first, self.layout.shard_rows)
        try:
            return np.asarray(array[shard, start : start + count])
        except ValueError as error:  # zarr's checksum errors are bare ValueErrors
            raise StoreCorruptError(
                f"shard {shard} cannot be read: {error}; delete the artifact and run the extract "
                "stage again"
            ) from error


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
        group = _open_group(zarr_store)
        shape = (layout.num_shards, layout.shard_rows, layout.hidden_size)
        attributes = {"logical_dtype": "bfloat16", "meaning": "row i predicts target_ids[i]"}
        _create(group, "hidden", shape, layout.chunk_rows, "uint16", attributes)
        _create(group, "target_ids", shape[:2], layout.chunk_rows, "int32", {})
    if group["hidden"].shape != shape:
        raise StoreCorruptError(
            f"{store.uri(kind, digest)} holds an array of {group['hidden'].shape}, expected "
            f"{shape}; delete that folder and run again"
        )
    return group["hidden"], group["target_ids"]


def _open_group(zarr_store: Any) -> Any:
    with contextlib.suppress(zarr.errors.ContainsGroupError):  # another process was faster
        return zarr.open_group(zarr_store, mode="a")
    return zarr.open_group(zarr_store, mode="r+")


def _create(
    group: Any,
    name: str,
    shape: tuple[int, ...],
    chunk_rows: int,
    dtype: str,
    attrs: dict[str, str],
) -> None:
    """Create an array, unless it or another process's is there: their metadata are the same."""
    if name in group:
        return
    with contextlib.suppress(zarr.errors.ContainsArrayError):
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
        )
