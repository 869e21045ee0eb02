"""The zarr store of hidden states: what goes in comes out, to whoever can show the right tokens."""

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.artifact import ArtifactRef
from storage.errors import RowsMismatchError, StoreCorruptError, StoreError
from storage.hidden_states import HiddenStateReader, HiddenStateWriter, StoredSequence, plan_layout
from storage.store import ArtifactStore

HIDDEN = 6


class Stored:
    """Random sequences and the writer and reader for them."""

    def __init__(self, store: ArtifactStore, counts: list[int], *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.store = store
        self.digest = f"{seed:032x}"
        self.hidden = [rng.integers(0, 2**16, (n, HIDDEN), dtype=np.uint16) for n in counts]
        self.targets = [rng.integers(0, 999, n, dtype=np.int32) for n in counts]
        self.keys = [rng.bytes(16) for _ in counts]
        self.sequences = [
            StoredSequence(digest=k, num_rows=len(h))
            for k, h in zip(self.keys, self.hidden, strict=True)
        ]
        self.layout = plan_layout(
            hidden_size=HIDDEN, sequences=self.sequences, shard_rows=16, chunk_rows=4
        )

    def writer(self) -> HiddenStateWriter:
        return HiddenStateWriter(
            store=self.store,
            kind="states",
            digest=self.digest,
            layout=self.layout,
            sequences=self.sequences,
        )

    def write(self, writer: HiddenStateWriter, shards: list[int]) -> None:
        for shard in shards:
            numbers = writer.sequences_of(shard)
            writer.write_shard(
                shard, [self.hidden[i] for i in numbers], [self.targets[i] for i in numbers]
            )

    def commit(self) -> ArtifactRef:
        return self.store.commit(
            kind="states",
            digest=self.digest,
            code_version=1,
            config={},
            inputs={},
            counts={},
            info={"layout": vars(self.layout)},
            seconds=0.0,
        )

    def write_all(self) -> HiddenStateReader:
        writer = self.writer()
        self.write(writer, writer.missing_shards())
        writer.close()
        return HiddenStateReader(store=self.store, ref=self.commit())

    def assert_readable(self, reader: HiddenStateReader) -> None:
        assert len(reader) == len(self.keys)
        for key, hidden, targets in zip(self.keys, self.hidden, self.targets, strict=True):
            np.testing.assert_array_equal(reader.rows(key, targets), hidden)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    yield ArtifactStore(root=root, scratch=str(tmp_path / "scratch"))
    fsspec.filesystem("memory").store.clear()


def test_round_trip_over_several_shards(store: ArtifactStore) -> None:
    stored = Stored(store, [5, 16, 1, 40, 3, 0, 16])  # one is longer than the shards asked for
    assert stored.layout.shard_rows == 40
    stored.assert_readable(stored.write_all())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_round_trip_of_any_lengths(tmp_path: Path, counts: list[int], seed: int) -> None:
    root = tempfile.mkdtemp(dir=tmp_path)
    stored = Stored(ArtifactStore(root=root, scratch=root), counts, seed=seed)
    stored.assert_readable(stored.write_all())


@pytest.mark.parametrize("order", [[], [0], [2], [3, 0], [1, 2, 3], [3, 2, 1, 0]])
def test_whatever_shards_are_there_serve_the_next_writer(
    store: ArtifactStore, order: list[int]
) -> None:
    stored = Stored(store, [5, 16, 1, 14, 3, 2, 9])
    stored.write(stored.writer(), order)  # and then it is gone
    second = stored.writer()
    missing = second.missing_shards()
    assert sorted(missing + order) == [0, 1, 2, 3]
    stored.write(second, missing)
    second.close()
    stored.assert_readable(HiddenStateReader(store=store, ref=stored.commit()))


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Both find nothing there, and each writes its half while the other does."""
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [11] * 40)
    start = threading.Barrier(2)

    def write(half: int) -> None:
        start.wait()
        stored.write(stored.writer(), list(range(half, 40, 2)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    stored.writer().close()
    stored.assert_readable(HiddenStateReader(store=store, ref=stored.commit()))


def test_a_damaged_shard_is_written_again(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [16, 16, 16])
    stored.write_all()
    shard = Path(store.folder("states", stored.digest)) / "states.zarr/hidden/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "has" in (store.why_absent("states", stored.digest) or "")
    writer = stored.writer()
    assert writer.missing_shards() == [1]
    stored.write(writer, [1])
    writer.close()
    stored.assert_readable(HiddenStateReader(store=store, ref=stored.commit()))


def test_it_is_plain_zarr(tmp_path: Path) -> None:
    """Any zarr v3 reader can open the arrays."""
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [5, 14])
    stored.write_all()
    group = zarr.open_group(f"{store.folder('states', stored.digest)}/states.zarr", mode="r")
    for shard, hidden in enumerate(stored.hidden):
        np.testing.assert_array_equal(np.asarray(group["hidden"])[shard, : len(hidden)], hidden)
    assert group["hidden"].shards == (1, 16, HIDDEN)
    assert group["hidden"].chunks == (1, 4, HIDDEN)
    assert group["hidden"].attrs["logical_dtype"] == "bfloat16"


def test_unknown_sequence_is_refused(store: ArtifactStore) -> None:
    reader = Stored(store, [5, 3]).write_all()
    with pytest.raises(RowsMismatchError, match="no teacher states for the sequence"):
        reader.rows(b"\0" * 16, np.zeros(5, np.int32))


@pytest.mark.parametrize("change", ["truncate", "shift", "swap"])
def test_rows_are_given_only_for_the_tokens_they_predict(store: ArtifactStore, change: str) -> None:
    stored = Stored(store, [5, 5])
    reader = stored.write_all()
    wrong = {
        "truncate": stored.targets[0][:-1],
        "shift": np.roll(stored.targets[0], 1),
        "swap": stored.targets[1],
    }[change]
    with pytest.raises(RowsMismatchError, match="predict other tokens"):
        reader.rows(stored.keys[0], wrong)


def shard_file(store: ArtifactStore, stored: Stored) -> Path:
    return Path(store.folder("states", stored.digest)) / "states.zarr/hidden/c/0/0/0"


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [16])
    reader = stored.write_all()
    content = bytearray(shard_file(store, stored).read_bytes())
    content[10] ^= 1
    shard_file(store, stored).write_bytes(content)
    with pytest.raises(StoreCorruptError, match="shard 0 cannot be read"):
        reader.rows(stored.keys[0], stored.targets[0])


def test_a_missing_shard_is_refused_and_does_not_read_as_zeros(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [16])
    reader = stored.write_all()
    shard_file(store, stored).unlink()
    with pytest.raises(StoreCorruptError, match="not those that were written"):
        reader.rows(stored.keys[0], stored.targets[0])
    assert "is gone" in (store.why_absent("states", stored.digest) or "")


def test_shards_exchanged_on_disk_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(root=str(tmp_path / "store"), scratch=str(tmp_path))
    stored = Stored(store, [16, 16])
    reader = stored.write_all()
    one, two = shard_file(store, stored), shard_file(store, stored).parents[2] / "1/0/0"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="not those that were written"):
        reader.rows(stored.keys[0], stored.targets[0])


def test_other_rows_than_planned_are_refused(store: ArtifactStore) -> None:
    stored = Stored(store, [5, 3])
    with pytest.raises(StoreError, match=r"planned with 5 rows of 6, the teacher gave \(4, 6\)"):
        stored.writer().write_shard(
            0, [stored.hidden[0][:4], stored.hidden[1]], [stored.targets[0][:4], stored.targets[1]]
        )
    with pytest.raises(StoreError, match="1 of 1 planned shards were not written"):
        stored.writer().close()


@pytest.mark.parametrize(
    ("hidden", "chunk", "shard"),
    [(1024, 256, 32768), (2048, 128, 16384), (4096, 64, 8192), (7168, 32, 4096)],
)
def test_default_sizes(hidden: int, chunk: int, shard: int) -> None:
    layout = plan_layout(hidden_size=hidden, sequences=[], shard_rows=None, chunk_rows=None)
    assert (layout.chunk_rows, layout.shard_rows) == (chunk, shard)
