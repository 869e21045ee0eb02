"""Shards that other artifacts have already: taken over as they are, instead of written again.

A night's states are mostly those of the night before. A shard of another artifact that is at least
half full of what is wanted becomes a shard of this one: by a second name of its file (a hard link)
on a disk, by a copy that the object store makes itself. The artifact is whole without the other.
Shards that hold less are not taken, so that their number stays within twice of what it must be.

What is taken over is settled once, before the first shard, in `borrowed.arrow`: every process goes
by it, and an attempt that goes on does.

Dimensions: N sequences, M of them in borrowed shards.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from storage.artifact import FileRecord
from storage.digests import Digests
from storage.errors import ArtifactMissingError, StoreCorruptError
from storage.states.commit import Commit
from storage.states.files import (
    FITTED,
    INDEX,
    StateFiles,
    commit_file,
    hidden_file,
    read_index,
    targets_file,
)
from storage.states.layout import Layout, Sequences, shard_of
from storage.states.reader import HiddenStateReader
from storage.store import ArtifactStore

BORROWED = "borrowed.arrow"
NOBODY = "states/"  # the lender of shards that are the artifact's own
LEAST_SHARE = 0.5  # of a shard, that is wanted
SCHEMA = pa.schema([("number", pa.int64()), ("first_row", pa.int64()), ("rows_xxh3", pa.uint64())])


@dataclass(frozen=True, kw_only=True)
class Borrowed:
    """The first shards of an artifact: `shards` of others, by the artifact's `kind/digest` and the
    number there; which sequences are read from them (`number` [M]), the row at which each begins
    (counted over the borrowed shards as if they were full) and the XXH3-64 of its rows.
    """

    shards: tuple[tuple[str, int], ...]
    number: np.ndarray
    first_row: np.ndarray
    rows_xxh3: np.ndarray

    def to_bytes(self) -> bytes:
        """As an Arrow file."""
        schema = SCHEMA.with_metadata({"shards": json.dumps(self.shards)})
        batch = pa.record_batch(
            [pa.array(c) for c in (self.number, self.first_row, self.rows_xxh3)], schema=schema
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as file:
            file.write_batch(batch)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, content: bytes) -> "Borrowed | None":
        """None for a damaged file."""
        try:
            file = pa.ipc.open_file(pa.py_buffer(content))
            batch, metadata = file.get_batch(0), file.schema.metadata
            shards = json.loads(metadata[b"shards"])
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError):
            return None
        number, first_row, rows_xxh3 = (batch.column(name).to_numpy() for name in SCHEMA.names)
        return cls(
            shards=tuple((name, shard) for name, shard in shards),
            number=number,
            first_row=first_row,
            rows_xxh3=rows_xxh3,
        )


def nothing_borrowed() -> Borrowed:
    """Every shard is written."""
    none = np.zeros(0, np.int64)
    return Borrowed(shards=(), number=none, first_row=none, rows_xxh3=none.astype(np.uint64))


def settle_borrowed(
    files: StateFiles,
    layout: Layout,
    sequences: Sequences,
    lenders: Callable[[], Mapping[str, HiddenStateReader]],
) -> Borrowed:
    """What an artifact takes over of the `lenders`, the first of them first: as it was settled
    before, or settled now. One of which shards are there already takes nothing: an earlier attempt
    has written them, or it was finished once, and every sequence is where it was.
    """
    content = files.read_many([BORROWED]).get(BORROWED)
    found = None if content is None else Borrowed.from_bytes(content)
    if found is not None:
        return found
    files.remove(BORROWED)  # what a crash has damaged
    if not any(name.startswith("commits/") for name in files.sizes()):
        mine = _choose(layout, sequences, lenders())
    else:
        mine = _as_indexed(files, layout, sequences) or nothing_borrowed()
    settled = Borrowed.from_bytes(files.create(BORROWED, mine.to_bytes()))
    return mine if settled is None else settled


def _as_indexed(files: StateFiles, layout: Layout, sequences: Sequences) -> Borrowed | None:
    """Every sequence where the index of an artifact that was finished once has it."""
    content = files.read_many([INDEX]).get(INDEX)
    index = None if content is None else read_index(content)
    if index is None or not np.array_equal(
        Digests(index.column("digest")).as_array(), sequences.digests
    ):
        return None
    first_row = index.column("first_row").to_numpy()
    shards = shard_of(first_row, sequences.num_rows, layout.shard_rows)
    return Borrowed(
        shards=tuple((NOBODY, shard) for shard in range(int(shards.max(initial=-1)) + 1)),
        number=np.arange(len(sequences)),
        first_row=first_row,
        rows_xxh3=index.column("rows_xxh3").to_numpy(),
    )


def _choose(
    layout: Layout, sequences: Sequences, lenders: Mapping[str, HiddenStateReader]
) -> Borrowed:
    """Shards of lenders of the same layout that are full enough of what no one before has."""
    left_N = np.ones(len(sequences), bool)
    scales: list[np.ndarray | None] = []  # of a lossy codec: an artifact has them once
    shards: list[tuple[str, int]] = []
    numbers, rows, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
    for name, reader in lenders.items():
        other = replace(reader.layout, num_rows=layout.num_rows, num_shards=layout.num_shards)
        if other != layout or not all(_are_equal(reader.fitted, own) for own in scales):
            continue
        place = reader.places(sequences.digests)
        here_N = left_N & place.here & (place.num_rows == sequences.num_rows)
        wanted = np.flatnonzero(here_N)
        count = np.bincount(
            place.shard[wanted],
            weights=sequences.num_rows[wanted],
            minlength=reader.layout.num_shards,
        )
        taken = np.flatnonzero(count >= LEAST_SHARE * layout.shard_rows)
        scales += [reader.fitted] if len(taken) else []
        own_number = np.full(reader.layout.num_shards, -1)
        own_number[taken] = len(shards) + np.arange(len(taken))
        chosen = wanted[own_number[place.shard[wanted]] >= 0]
        moved = own_number[place.shard[chosen]] - place.shard[chosen]
        shards += [(name, int(shard)) for shard in taken]
        numbers.append(chosen)
        rows.append(place.first_row[chosen] + moved * layout.shard_rows)
        hashes.append(place.rows_xxh3[chosen])
        left_N[chosen] = False
    return Borrowed(
        shards=tuple(shards),
        number=np.concatenate(numbers),
        first_row=np.concatenate(rows),
        rows_xxh3=np.concatenate([np.zeros(0, np.uint64), *hashes]),
    )


def _are_equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


class Lender:
    """An artifact that shards are taken from, by its `kind/digest`; it may be gone."""

    def __init__(self, store: ArtifactStore, name: str) -> None:
        self.name = name
        kind, _, digest = name.partition("/")
        self._files = StateFiles(store, kind, digest)
        self._records: dict[str, FileRecord] = {}
        with suppress(ArtifactMissingError, StoreCorruptError):
            self._records = {file.path: file for file in store.manifest(kind, digest).files}

    def lend(self, number: int, shard: int, to: StateFiles) -> Commit | None:
        """Give a shard to another artifact, under its number there; what there is to record of it
        but for its rows. None where it is not here, or cannot be given without being written again.
        """
        names = {name(number): name(shard) for name in (hidden_file, targets_file)}
        if FITTED in self._records:
            names[FITTED] = FITTED
        name = commit_file(number)
        commit = Commit.from_bytes(self._files.read_many([name]).get(name, b""))
        if commit is None or not names.keys() <= self._records.keys():
            return None
        if not all(to.take(self._files, own, new) for own, new in names.items()):
            return None
        files = [self._records[own].model_copy(update={"path": new}) for own, new in names.items()]
        return replace(commit, files=tuple(files))
