"""Reading hidden states: the rows of a sequence, by its digest and target ids.

Dimensions: N rows of a sequence, H hidden size.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from storage.artifact import ArtifactRef, FileRecord
from storage.codecs import codec_named
from storage.digests import DIGEST_BYTES, Digests
from storage.errors import RowsMismatchError, StoreCorruptError
from storage.read_cache import ReadCache
from storage.states.files import (
    FITTED,
    INDEX,
    hash_rows,
    hidden_file,
    read_fitted,
    read_hidden,
    read_index,
    read_targets,
    targets_file,
)
from storage.states.layout import Layout, shard_of
from storage.states.shard_file import ShardFile
from storage.store import ArtifactStore

OPEN_SHARDS = 64
REMEDY = "`kdflow store verify --repair` removes what is damaged, the next run computes it again"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where some sequences are, [N] each: whether they are `here` at all, their shard, first row
    (counted over all shards as if they were full), number of rows, and the XXH3-64 of those.
    """

    here: np.ndarray
    shard: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    rows_xxh3: np.ndarray


class HiddenStateReader:
    """Gives the rows of a sequence. May be used by several threads.

    Local shards are mapped into memory, those of a remote store are downloaded first. Rows are
    hashed when they are read for the first time. `fitted` is what a lossy codec has fixed once.
    """

    def __init__(
        self, *, store: ArtifactStore, ref: ArtifactRef, cache_bytes: int | None = None
    ) -> None:
        manifest = store.manifest(ref.kind, ref.digest)
        self.layout = Layout(**manifest.info["layout"])
        self._codec = codec_named(self.layout.codec)
        self._files = {file.path: file for file in manifest.files}
        self._cache = ReadCache(store, ref, cache_bytes)
        batch = self._open_index()
        self._digests = Digests(batch.column("digest"))
        self._first = batch.column("first_row").to_numpy()
        self._count = batch.column("num_rows").to_numpy()
        self._hash = batch.column("rows_xxh3").to_numpy()
        self.fitted = self._read_fitted()
        self._trusted = np.zeros(len(self._count), bool)
        self._open: OrderedDict[int, tuple[ShardFile, ShardFile]] = OrderedDict()
        self._lock = threading.Lock()

    def _open_index(self) -> pa.RecordBatch:
        index = read_index(self._checked(INDEX))
        if index is None:
            raise StoreCorruptError(f"{INDEX} is not an Arrow file; {REMEDY}")
        return index

    def _checked(self, name: str) -> np.ndarray:
        """A file's bytes, mapped, when they have the checksum that the manifest records."""
        content = self._cache.map(self._record(name))
        if xxhash.xxh3_128_hexdigest(content.data) != self._files[name].xxh3:
            raise StoreCorruptError(f"{name} does not have its checksum; {REMEDY}")
        return content

    def _record(self, name: str) -> FileRecord:
        if name not in self._files:
            raise StoreCorruptError(f"the manifest has no {name}; {REMEDY}")
        return self._files[name]

    def _read_fitted(self) -> np.ndarray | None:
        if self._codec.lossless:
            return None
        return read_fitted(self._checked(FITTED).tobytes(), self.layout)

    def __len__(self) -> int:
        return len(self._digests)

    def shard_of(self, digests: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sequence, by digests uint8 [N, 16].

        Raises RowsMismatchError.
        """
        entries, here = self._found(digests)
        for i in np.flatnonzero(~here):
            self._entry(digests[i].tobytes())  # says that it is not there
        return self._shard_of(entries)

    def holds(self, digests: np.ndarray) -> np.ndarray:
        """Whether the rows of each sequence are here, by digests uint8 [N, 16]."""
        return self._found(digests)[1]

    def places(self, digests: np.ndarray) -> Places:
        """Where the rows of each sequence are, by digests uint8 [N, 16], of a store that holds
        some.
        """
        entries, here = self._found(digests)
        return Places(
            here=here,
            shard=self._shard_of(entries),
            first_row=self._first[entries],
            num_rows=self._count[entries],
            rows_xxh3=self._hash[entries],
        )

    def _found(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entry with each digest, or one near it; and whether it is the digest's own."""
        known = self._digests.as_array()
        wanted = np.ascontiguousarray(digests)
        if not len(known):
            return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        entries = np.searchsorted(_first_halves(known), _first_halves(wanted))
        entries[entries == len(known)] = 0
        same = known[entries] == wanted
        here = np.asarray(same.all(axis=1))
        # Of two that share their first half, the search has found the first.
        for i in np.flatnonzero(same[:, : DIGEST_BYTES // 2].all(axis=1) & ~here):
            position = self._digests.position(digests[i].tobytes())
            if position is not None:
                entries[i], here[i] = position, True
        return entries, here

    def rows(self, digest: bytes, target_ids_N: np.ndarray) -> np.ndarray:
        """The bfloat16 bits [N, H] of one sequence's states; of codec `raw`, without a copy.

        Raises:
            RowsMismatchError: no such digest, or the rows predict other tokens than `target_ids_N`.
            StoreCorruptError: the rows are not the ones that were written.
        """
        entry = self._entry(digest)
        shard = int(self._shard_of(entry))
        start = int(self._first[entry]) - shard * self.layout.shard_rows
        stop = start + int(self._count[entry])
        hidden, targets = self._shard(shard)
        expected_N = targets.rows(start, stop)[0]
        if not np.array_equal(expected_N, target_ids_N):
            self._checked(targets_file(shard))  # where it is damaged, that is the reason
            raise RowsMismatchError(
                f"the {len(expected_N)} stored rows of sequence {digest.hex()} predict other "
                f"tokens than the {len(target_ids_N)} of the student's sequence; run the extract "
                "stage again"
            )
        try:
            stored_PNW = hidden.rows(start, stop)
        except StoreCorruptError as error:
            raise StoreCorruptError(f"{error}; {REMEDY}") from error
        if not self._trusted[entry]:
            if hash_rows(stored_PNW) != int(self._hash[entry]):
                raise StoreCorruptError(
                    f"the stored rows of sequence {digest.hex()} in shard {shard} are not those "
                    f"that were written; {REMEDY}"
                )
            self._trusted[entry] = True
        return self._codec.decode(stored_PNW, self.fitted)

    def _shard_of(self, entries: int | np.ndarray) -> np.ndarray:
        return shard_of(self._first[entries], self._count[entries], self.layout.shard_rows)

    def _entry(self, digest: bytes) -> int:
        position = self._digests.position(digest)
        if position is None:
            raise RowsMismatchError(
                f"no teacher states for the sequence with digest {digest.hex()}: its ids or its "
                "supervision mask differ from what the teacher saw; run the extract stage again"
            )
        return position

    def _shard(self, shard: int) -> tuple[ShardFile, ShardFile]:
        """A shard's rows and target ids; those used last stay open."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = self._open_shard(shard)
        with self._lock:
            self._open[shard] = opened
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def _open_shard(self, shard: int) -> tuple[ShardFile, ShardFile]:
        names = hidden_file(shard), targets_file(shard)
        try:
            hidden, targets = (self._cache.map(self._record(name)) for name in names)
            return (
                read_hidden(hidden, self.layout, title=names[0]),
                read_targets(targets, self.layout, title=names[1]),
            )
        except StoreCorruptError as error:
            raise StoreCorruptError(f"shard {shard} cannot be read: {error}; {REMEDY}") from error


def _first_halves(digests: np.ndarray) -> np.ndarray:
    """The upper 64 bits of digests uint8 [N, 16], in the machine's order."""
    return np.asarray(digests.view(">u8")[:, 0], np.uint64)
