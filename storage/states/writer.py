"""Writing hidden states: shard by shard, from any process.

Dimensions: N rows of a sequence, R rows of a shard, H hidden size, P planes, W values of a plane,
C rows of a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from storage.artifact import FileRecord
from storage.codecs import codec_named
from storage.digests import DIGEST_BYTES, digest_column
from storage.errors import StoreCorruptError, StoreError
from storage.states.borrowing import BORROWED, Borrowed, Lender, nothing_borrowed
from storage.states.commit import Commit
from storage.states.files import (
    FITTED,
    INDEX,
    StateFiles,
    commit_file,
    hash_rows,
    hidden_file,
    read_fitted,
    read_hidden,
    record,
    targets_file,
)
from storage.states.layout import Layout, Sequences
from storage.states.metadata import zarr_metadata
from storage.states.placement import Placement
from storage.states.shard_file import encode_shard
from storage.store import ArtifactStore

INDEX_SCHEMA = pa.schema(
    [
        ("digest", pa.binary(DIGEST_BYTES)),
        ("first_row", pa.int64()),
        ("num_rows", pa.int32()),
        ("rows_xxh3", pa.uint64()),
        ("source", pa.dictionary(pa.int16(), pa.string())),
    ]
)
# Compares exact and stored rows, both [N, H] in bits of bfloat16.
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]
MEASURED_ROWS = 64
SHARD_FOLDERS = ("states.zarr/hidden/c/", "commits/")


class HiddenStateWriter:
    """Writes planned sequences, a whole shard at a time, in any order and from any process.

    Every process that has the same plan addresses the same shards; they agree among themselves on
    who writes which. Where they do not, the first one's shard stays.
    """

    def __init__(
        self,
        *,
        store: ArtifactStore,
        kind: str,
        digest: str,
        layout: Layout,
        sequences: Sequences,
        borrowed: Borrowed | None = None,
    ) -> None:
        self._codec = codec_named(layout.codec)
        self._borrowed = nothing_borrowed() if borrowed is None else borrowed
        self._placement = Placement(layout, sequences, self._borrowed)
        self.layout = replace(layout, num_shards=self._placement.num_shards)
        self._sequences = sequences
        self._files = StateFiles(store, kind, digest)
        self._fitted: np.ndarray | None = None
        self._metadata = [
            record(f"states.zarr/{name}", content)
            for name, content in zarr_metadata(self.layout).items()
        ]
        for name, content in zarr_metadata(self.layout).items():
            self._files.create_as(f"states.zarr/{name}", content)

    def sequences_of(self, shard: int) -> list[int]:
        """The numbers of a shard's sequences."""
        return [int(number) for number in self._placement.sequences_of(shard)]

    def rows_of(self, shards: Sequence[int]) -> int:
        """The rows of some shards' sequences."""
        rows = self._sequences.num_rows
        return sum(int(rows[self._placement.sequences_of(shard)].sum()) for shard in shards)

    def borrow(self) -> int:
        """Take over the borrowed shards that are not there yet; returns how many that are. One that
        its lender has no longer is missing, as one that was never written.
        """
        sizes = self._files.sizes()
        hashes = np.full(len(self._sequences), hash_rows(np.empty((0, 0, 0))), np.uint64)
        hashes[self._borrowed.number] = self._borrowed.rows_xxh3
        lender: Lender | None = None
        taken = 0
        for shard, (name, number) in enumerate(self._borrowed.shards):
            if commit_file(shard) in sizes:
                continue
            if lender is None or lender.name != name:  # a lender's shards stand together
                lender = Lender(self._files.store, name)
            commit = lender.lend(number, shard, self._files)
            if commit is None:
                continue
            numbers, rows = self._placement.sequences_of(shard), self._placement.num_rows(shard)
            commit = replace(commit, rows=rows, rows_xxh3=hashes[numbers])
            self._files.create(commit_file(shard), commit.to_bytes())
            taken += 1
        return taken

    def missing_shards(self) -> list[int]:
        """Shards without a commit, or whose files do not have the sizes that it records.

        What is left of a damaged shard is removed, so that it can be written again.
        """
        sizes = self._files.sizes()
        commits = self._commits(sizes)
        if not self._fits(sizes, commits):
            for name in sizes:
                if name == FITTED or name.startswith(SHARD_FOLDERS):
                    self._files.remove(name)
            return list(range(self.layout.num_shards))
        missing = []
        for shard in range(self.layout.num_shards):
            commit = commits.get(shard)
            if commit is None or any(sizes.get(f.path) != f.num_bytes for f in commit.files):
                missing.append(shard)
                if commit_file(shard) in sizes:
                    for name in (commit_file(shard), hidden_file(shard), targets_file(shard)):
                        self._files.remove(name)
        return missing

    def _fits(self, sizes: Mapping[str, int], commits: Mapping[int, Commit]) -> bool:
        """Whether the shards are those of the plan, and what a lossy codec has fixed is still what
        they were written with.
        """
        for shard, commit in commits.items():
            planned = self._placement.num_rows(shard), len(self._placement.sequences_of(shard))
            if (commit.rows, len(commit.rows_xxh3)) != planned:
                return False
        if self._codec.lossless or not any(name.startswith(SHARD_FOLDERS) for name in sizes):
            return True
        content = self._files.read_many([FITTED]).get(FITTED)
        if content is None:
            return False
        now = record(FITTED, content)
        then = [f for commit in commits.values() for f in commit.files if f.path == FITTED]
        return all(file == now for file in then)

    def _commits(self, sizes: Mapping[str, int]) -> dict[int, Commit]:
        """The readable commits by shard."""
        names = {commit_file(shard): shard for shard in range(self.layout.num_shards)}
        contents = self._files.read_many([name for name in names if name in sizes])
        commits = {names[name]: Commit.from_bytes(c) for name, c in contents.items()}
        return {shard: commit for shard, commit in commits.items() if commit is not None}

    def write_shard(
        self,
        shard: int,
        hidden: Sequence[np.ndarray],
        target_ids: Sequence[np.ndarray],
        measure: Measure | None = None,
    ) -> None:
        """Write and commit a shard: for each of its sequences the rows [N, H] (bfloat16 bits,
        uint16) and the token that each predicts [N].

        `measure` compares some of the rows with what a lossy codec makes of them.
        """
        self._check_shapes(shard, hidden)
        bits_RH = self._joined(shard, hidden, np.empty((0, self.layout.hidden_size), np.uint16))
        targets_R = self._joined(shard, target_ids, np.empty(0, np.int32))
        targets = encode_shard(
            [list(_chunks(targets_R, self.layout.chunk_rows))],
            chunks_of_shard=self._chunks_of_shard,
            compressed=False,
        )
        self._files.create_as(targets_file(shard), targets)
        content, stored_PRW = self._create_hidden(shard, bits_RH)
        files = [record(hidden_file(shard), content), record(targets_file(shard), targets)]
        if self._fitted is not None:
            files.append(record(FITTED, self._fitted.tobytes()))
        commit = Commit(
            rows=len(bits_RH),
            files=tuple(files),
            rows_xxh3=np.array(
                [
                    hash_rows(stored_PRW[:, begin:end])
                    for begin, end in zip(*self._placement.rows_of(shard), strict=True)
                ],
                np.uint64,
            ),
            measured=self._measured(bits_RH, stored_PRW, measure),
        )
        self._files.create(commit_file(shard), commit.to_bytes())

    def _check_shapes(self, shard: int, hidden: Sequence[np.ndarray]) -> None:
        for number, hidden_NH in zip(self.sequences_of(shard), hidden, strict=True):
            expected = (int(self._sequences.num_rows[number]), self.layout.hidden_size)
            if hidden_NH.shape != expected:
                raise StoreError(
                    f"sequence {number} was planned with {expected[0]} rows of {expected[1]}, the "
                    f"teacher gave {hidden_NH.shape}"
                )

    def _joined(self, shard: int, parts: Sequence[np.ndarray], none: np.ndarray) -> np.ndarray:
        """The rows of a shard's sequences where they belong. Between them are zeros where a
        borrowed shard, which is written again, held others.
        """
        joined = np.zeros((self._placement.num_rows(shard), *none.shape[1:]), none.dtype)
        for begin, end, part in zip(*self._placement.rows_of(shard), parts, strict=True):
            joined[begin:end] = part
        return joined

    @property
    def _chunks_of_shard(self) -> int:
        return self.layout.shard_rows // self.layout.chunk_rows

    def _create_hidden(self, shard: int, bits_RH: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Create the file of a shard's rows; its content, and the rows [P, R, W] as read from it.

        Another writer may have been faster: then its file is the shard's.
        """
        self._fit(bits_RH)
        chunks = [
            self._codec.encode(chunk_CH, self._fitted)
            for chunk_CH in _chunks(bits_RH, self.layout.chunk_rows)
        ]
        mine = encode_shard(
            [[chunk_PCW[plane] for chunk_PCW in chunks] for plane in range(self._codec.planes)],
            chunks_of_shard=self._chunks_of_shard,
            compressed=self._codec.compressed,
        )
        name = hidden_file(shard)
        content = self._files.create(name, mine)
        try:
            return content, self._rows_of(content, len(bits_RH), name)
        except StoreCorruptError:  # what a crash of another writer's machine has left
            self._files.remove(name)
            content = self._files.create(name, mine)
            return content, self._rows_of(content, len(bits_RH), name)

    def _rows_of(self, content: bytes, rows: int, title: str) -> np.ndarray:
        data = np.frombuffer(content, np.uint8)
        return read_hidden(data, self.layout, title=title).rows(0, rows)

    def _fit(self, bits_RH: np.ndarray) -> None:
        """Fix what the codec fixes once, by the first shard of all writers; or take it over."""
        if self._codec.lossless or self._fitted is not None or not len(bits_RH):
            return
        fitted_H = self._codec.fit(bits_RH)
        if fitted_H is not None:
            content = self._files.create(FITTED, fitted_H.astype("<f4").tobytes())
            self._fitted = read_fitted(content, self.layout)

    def _measured(
        self, bits_RH: np.ndarray, stored_PRW: np.ndarray, measure: Measure | None
    ) -> dict[str, float]:
        if measure is None or self._codec.lossless or not len(bits_RH):
            return {}
        some = np.linspace(0, len(bits_RH) - 1, min(MEASURED_ROWS, len(bits_RH))).astype(int)
        decoded_NH = self._codec.decode(stored_PRW[:, some], self._fitted)
        return measure(bits_RH[some], decoded_NH)

    def close(self) -> tuple[list[FileRecord], list[dict[str, float]]]:
        """Write the index. All shards must be there.

        Returns the records of all files, and what was measured, by shard.
        """
        sizes = self._files.sizes()
        commits = self._commits(sizes)
        absent = self.layout.num_shards - len(commits)
        if absent:
            raise StoreError(
                f"{absent} of {self.layout.num_shards} planned shards were not written"
            )
        ordered = [commits[shard] for shard in range(self.layout.num_shards)]
        hashes = np.zeros(len(self._sequences), np.uint64)
        hashes[self._placement.order] = np.concatenate([commit.rows_xxh3 for commit in ordered])
        index = record(INDEX, content := self.index(hashes))
        self._files.write(INDEX, content)
        files = {f.path: f for commit in ordered for f in commit.files}
        for file in (*self._metadata, index):
            files[file.path] = file
        names = [commit_file(shard) for shard in range(self.layout.num_shards)]
        names += [BORROWED] if BORROWED in sizes else []
        for name, text in self._files.read_many(names).items():
            files[name] = record(name, text)
        return list(files.values()), [c.measured for c in ordered if c.measured]

    def index(self, hashes: np.ndarray) -> bytes:
        """The index as an Arrow file of one batch, so that it can be mapped into memory; `hashes`
        are the XXH3-64 of each sequence's rows (uint64).
        """
        s = self._sequences
        first = self._placement.first_row
        source = pa.DictionaryArray.from_arrays(
            pa.array(s.source, pa.int16()), pa.array(s.source_names, pa.string())
        )
        columns = [digest_column(s.digests), first, s.num_rows.astype(np.int32), hashes, source]
        batch = pa.record_batch(
            [c if isinstance(c, pa.Array) else pa.array(c) for c in columns], schema=INDEX_SCHEMA
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, INDEX_SCHEMA) as file:
            file.write_batch(batch)
        return bytes(sink.getvalue())


def _chunks(rows: np.ndarray, chunk_rows: int) -> Iterator[np.ndarray]:
    """Whole chunks of rows, the last one filled up with zeros."""
    for begin in range(0, len(rows), chunk_rows):
        chunk = rows[begin : begin + chunk_rows]
        if len(chunk) < chunk_rows:
            whole = np.zeros((chunk_rows, *rows.shape[1:]), rows.dtype)
            whole[: len(chunk)] = chunk
            chunk = whole
        yield chunk
