"""Random sequences with their states, and the writer and reader for them."""

from dataclasses import asdict

import numpy as np

from storage.artifact import ArtifactRef
from storage.states.borrowing import Borrowed, settle_borrowed
from storage.states.files import StateFiles
from storage.states.layout import Sequences, plan_layout
from storage.states.reader import HiddenStateReader
from storage.states.writer import HiddenStateWriter
from storage.store import ArtifactStore

HIDDEN = 6


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 cut to bfloat16, as bits."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Stored:
    """Finite random states of `counts` rows each, in the order of their random digests."""

    def __init__(
        self,
        store: ArtifactStore,
        counts: list[int],
        *,
        seed: int = 0,
        hidden: int = HIDDEN,
        codec: str = "raw",
        shard_rows: int = 16,
        chunk_rows: int = 4,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.store = store
        self.digest = f"{seed:032x}"
        self.hidden = [bfloat16_bits(rng.normal(size=(n, hidden))) for n in counts]
        self.targets = [rng.integers(0, 999, n, dtype=np.int32) for n in counts]
        self.keys = sorted(rng.bytes(16) for _ in counts)
        self.sequences = Sequences(
            digests=np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 16),
            num_rows=np.array(counts, np.int32),
            source=np.array([i % 2 for i in range(len(counts))], np.int16),
            source_names=("even", "odd"),
        )
        self.layout = plan_layout(
            hidden_size=hidden,
            num_rows=counts,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            codec=codec,
        )

    def with_rows_of(self, other: "Stored") -> "Stored":
        """Holds those of another beside its own."""
        own, theirs = (zip(s.keys, s.hidden, s.targets, strict=True) for s in (self, other))
        together = sorted([*own, *theirs], key=lambda item: item[0])
        self.keys = [key for key, _, _ in together]
        self.hidden = [hidden for _, hidden, _ in together]
        self.targets = [targets for _, _, targets in together]
        self.sequences = Sequences(
            digests=np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 16),
            num_rows=np.array([len(targets) for targets in self.targets], np.int32),
            source=np.zeros(len(together), np.int16),
            source_names=("all",),
        )
        self.layout = plan_layout(
            hidden_size=self.layout.hidden_size,
            num_rows=self.sequences.num_rows,
            shard_rows=self.layout.shard_rows,
            chunk_rows=self.layout.chunk_rows,
            codec=self.layout.codec,
        )
        return self

    def borrowing_writer(self, *lenders: "Stored") -> HiddenStateWriter:
        """A writer that takes over what others have, the first first."""
        borrowed = settle_borrowed(
            StateFiles(self.store, "states", self.digest),
            self.layout,
            self.sequences,
            lambda: {f"states/{lender.digest}": lender.reader() for lender in lenders},
        )
        writer = self.writer(borrowed)
        self.layout = writer.layout
        return writer

    def writer(self, borrowed: Borrowed | None = None) -> HiddenStateWriter:
        return HiddenStateWriter(
            store=self.store,
            kind="states",
            digest=self.digest,
            layout=self.layout,
            sequences=self.sequences,
            borrowed=borrowed,
        )

    def write(self, writer: HiddenStateWriter, shards: list[int]) -> None:
        for shard in shards:
            numbers = writer.sequences_of(shard)
            writer.write_shard(
                shard, [self.hidden[i] for i in numbers], [self.targets[i] for i in numbers]
            )

    def commit(self, writer: HiddenStateWriter) -> ArtifactRef:
        files, _ = writer.close()
        return self.store.commit(
            kind="states",
            digest=self.digest,
            code_version=1,
            config={},
            inputs={},
            files=files,
            counts={},
            info={"layout": asdict(self.layout)},
            seconds=0.0,
        )

    def finish(self) -> ArtifactRef:
        """Write what is missing and commit."""
        writer = self.writer()
        self.write(writer, writer.missing_shards())
        return self.commit(writer)

    def reader(self) -> HiddenStateReader:
        ref = self.store.find("states", self.digest)
        assert ref is not None
        return HiddenStateReader(store=self.store, ref=ref)

    def write_all(self) -> HiddenStateReader:
        self.finish()
        return self.reader()

    def assert_readable(self, reader: HiddenStateReader) -> None:
        assert len(reader) == len(self.keys)
        for key, hidden, targets in zip(self.keys, self.hidden, self.targets, strict=True):
            np.testing.assert_array_equal(reader.rows(key, targets), hidden)

    def file(self, name: str) -> str:
        return f"{self.store.folder('states', self.digest)}/{name}"
