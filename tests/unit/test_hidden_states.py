"""The zarr store of hidden states: what goes in comes out, to whoever can show the right tokens."""

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.codecs import CODECS
from storage.errors import RowsMismatchError, StoreError
from storage.states.layout import Sequences, plan_layout
from storage.store import ArtifactStore
from tests.stored import HIDDEN, Stored, bfloat16_bits, floats

LOSSLESS = [name for name, codec in CODECS.items() if codec.lossless]


def local(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder / "store"), scratch=str(folder / "scratch"))


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    yield ArtifactStore(root=root, scratch=str(tmp_path / "scratch"))
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("codec", LOSSLESS)
def test_round_trip_over_several_shards(store: ArtifactStore, codec: str) -> None:
    counts = [5, 16, 1, 40, 3, 0, 16]  # one is longer than the shards asked for
    stored = Stored(store, counts, codec=codec)
    assert stored.layout.shard_rows == 40
    stored.assert_readable(stored.write_all())


def test_a_sequence_without_rows_behind_a_full_shard(tmp_path: Path) -> None:
    for number, counts in enumerate(([16, 0], [0], [0, 16], [16, 0, 0, 5], [20, 0])):
        stored = Stored(local(tmp_path / str(number)), counts)
        reader = stored.write_all()
        stored.assert_readable(reader)
        empty = counts.index(0)
        with pytest.raises(RowsMismatchError, match="predict other tokens"):
            reader.rows(stored.keys[empty], np.ones(1, np.int32))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    hidden=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    codec=st.sampled_from(LOSSLESS),
    order=st.randoms(use_true_random=False),
)
def test_round_trip_of_any_lengths(
    tmp_path: Path, counts: list[int], hidden: int, seed: int, codec: str, order: object
) -> None:
    """Any widths, any order of writing and of reading, empty sequences too."""
    root = tempfile.mkdtemp(dir=tmp_path)
    stored = Stored(
        ArtifactStore(root=root, scratch=root), counts, seed=seed, hidden=hidden, codec=codec
    )
    writer = stored.writer()
    shards = writer.missing_shards()
    order.shuffle(shards)  # type: ignore[attr-defined]
    stored.write(writer, shards)
    stored.commit(writer)
    reader = stored.reader()
    numbers = list(range(len(counts)))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    for i in numbers:
        rows = reader.rows(stored.keys[i], stored.targets[i])
        np.testing.assert_array_equal(rows, stored.hidden[i])


@pytest.mark.parametrize("codec", LOSSLESS)
def test_all_bit_patterns_survive(tmp_path: Path, codec: str) -> None:
    """NaN, infinities, subnormals and both zeros included."""
    stored = Stored(local(tmp_path), [2**14], hidden=4, codec=codec, shard_rows=2**14)
    stored.hidden = [np.arange(2**16, dtype=np.uint16).reshape(-1, 4)]
    stored.assert_readable(stored.write_all())


def write_shards(folder: str, counts: list[int], shards: list[int]) -> None:
    stored = Stored(local(Path(folder)), counts)
    stored.write(stored.writer(), shards)


def read_share(folder: str, counts: list[int], share: int, of: int) -> None:
    stored = Stored(local(Path(folder)), counts)
    reader = stored.reader()
    for i in range(share, len(counts), of):
        rows = reader.rows(stored.keys[i], stored.targets[i])
        np.testing.assert_array_equal(rows, stored.hidden[i])


def test_written_by_three_processes_and_read_by_one_two_and_five(tmp_path: Path) -> None:
    counts = [7] * 60
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(3) as pool:
        shares = [(str(tmp_path), counts, list(range(k, 30, 3))) for k in range(3)]
        pool.starmap(write_shards, shares)
        stored = Stored(local(tmp_path), counts)
        writer = stored.writer()
        assert writer.missing_shards() == []
        stored.commit(writer)
        for of in (1, 2, 5):
            pool.starmap(read_share, [(str(tmp_path), counts, k, of) for k in range(of)])


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
    stored.commit(second)
    stored.assert_readable(stored.reader())


@pytest.mark.parametrize("codec", ["raw", "planes", "int8"])
def test_it_is_plain_zarr(tmp_path: Path, codec: str) -> None:
    """Any zarr v3 reader can open the arrays, of part of a last shard too."""
    stored = Stored(local(tmp_path), [5, 14, 9], codec=codec)
    stored.write_all()
    group = zarr.open_group(stored.file("states.zarr"), mode="r")
    assert group["hidden"].attrs["logical_dtype"] == "bfloat16"
    for shard in range(3):
        rows = np.asarray(group["hidden"][shard])[:, : len(stored.hidden[shard])]
        targets = np.asarray(group["target_ids"][shard])[: len(rows[0])]
        np.testing.assert_array_equal(targets, stored.targets[shard])
        bits = stored.hidden[shard]
        if codec == "raw":
            np.testing.assert_array_equal(rows[0], bits)
        elif codec == "planes":
            np.testing.assert_array_equal(rows[0], bits >> 7 & 0xFF)
            np.testing.assert_array_equal(rows[1], bits >> 8 & 0x80 | bits & 0x7F)
        else:
            scale = np.ascontiguousarray(rows[0][:, -4:]).view("<f4")
            values = rows[0][:, :-4].view(np.int8) * scale * np.asarray(group["fitted"])
            np.testing.assert_allclose(values, floats(bits), atol=0.05)


def test_int8_is_as_near_as_8_bits_allow(tmp_path: Path) -> None:
    """Also where one channel is 50 times larger than the others; the same for every reader."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(400, 64)).astype(np.float32)
    exact[:, 7] *= 50
    stored = Stored(local(tmp_path), [400], hidden=64, codec="int8", shard_rows=400)
    stored.hidden = [bfloat16_bits(exact)]
    reader = stored.write_all()
    rows = floats(reader.rows(stored.keys[0], stored.targets[0]))
    error = np.abs(rows - floats(stored.hidden[0]))
    rms = np.sqrt(np.square(exact).mean(axis=0))
    largest = np.abs(exact / rms).max(axis=1, keepdims=True)
    # Half a step of the quantizer, and the rounding to bfloat16 of the result.
    assert (error <= rms * largest / 127 * 0.51 + np.abs(rows) / 2**8).all()
    again = stored.reader().rows(stored.keys[0], stored.targets[0])
    np.testing.assert_array_equal(rows, floats(again))


def test_int8_takes_rows_of_zeros_and_refuses_what_is_not_finite(tmp_path: Path) -> None:
    stored = Stored(local(tmp_path), [8], codec="int8")
    stored.hidden = [np.zeros((8, HIDDEN), np.uint16)]
    stored.assert_readable(stored.write_all())
    broken = Stored(local(tmp_path), [8], codec="int8", seed=1)
    broken.hidden = [np.full((8, HIDDEN), 0x7F80, np.uint16)]
    with pytest.raises(StoreError, match=r"not finite cannot be int8; set storage\.codec=raw"):
        broken.finish()


@pytest.mark.parametrize("damage", ["other scales", "gone"])
def test_shards_are_never_joined_with_scales_of_others(tmp_path: Path, damage: str) -> None:
    """Neither committed ones nor one that a crash has left without its commit."""
    stored = Stored(local(tmp_path), [16, 16, 16], codec="int8")
    stored.write(stored.writer(), [0, 1])
    Path(stored.file("commits/000001.json")).unlink()
    fitted = Path(stored.file("states.zarr/fitted/c/0"))
    scales = np.frombuffer(fitted.read_bytes(), "<f4") * np.float32(2)
    if damage == "gone":
        fitted.unlink()
    else:
        fitted.write_bytes(scales.tobytes())
    writer = stored.writer()
    assert writer.missing_shards() == [0, 1, 2]
    stored.write(writer, [2, 1, 0])  # the scales are now those of other rows
    stored.commit(writer)
    reader = stored.reader()
    for key, targets, hidden in zip(stored.keys, stored.targets, stored.hidden, strict=True):
        rows = floats(reader.rows(key, targets))
        np.testing.assert_allclose(rows, floats(hidden), atol=0.05)


def test_what_a_lossy_codec_changes_is_shown_to_the_measure(tmp_path: Path) -> None:
    stored = Stored(local(tmp_path), [16, 16], codec="int8")
    writer = stored.writer()
    seen = []

    def measure(exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        seen.append((exact, decoded))
        return {"rows": float(len(exact))}

    for shard in (0, 1):
        writer.write_shard(shard, [stored.hidden[shard]], [stored.targets[shard]], measure)
    _, measured = stored.writer().close()  # by another process: it is in the shards' commits
    assert measured == [{"rows": 16.0}, {"rows": 16.0}]
    stored.finish()
    for shard, (exact, decoded) in enumerate(seen):
        np.testing.assert_array_equal(exact, stored.hidden[shard])
        rows = stored.reader().rows(stored.keys[shard], stored.targets[shard])
        np.testing.assert_array_equal(decoded, rows)


def test_raw_rows_are_mapped_and_not_copied(tmp_path: Path) -> None:
    stored = Stored(local(tmp_path), [6, 6, 4])
    reader = stored.write_all()
    first, second = (reader.rows(stored.keys[i], stored.targets[i]) for i in (0, 1))
    start = first.__array_interface__["data"][0]
    # One after the other in the same mapping, beyond the chunks' borders.
    assert second.__array_interface__["data"][0] == start + first.nbytes
    assert not first.flags.owndata
    first[:] = 0  # a private mapping: the file keeps its rows
    stored.assert_readable(stored.reader())


def test_the_index_is_small_and_knows_the_sources(tmp_path: Path) -> None:
    import pyarrow as pa

    stored = Stored(local(tmp_path), [1] * 5000, shard_rows=1024)
    stored.write_all()
    path = Path(stored.file("index.arrow"))
    assert path.stat().st_size / 5000 < 64
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.column("source").to_pylist()[:3] == ["even", "odd", "even"]
    assert table.column("digest").to_pylist() == stored.keys
    assert table.column("first_row").to_pylist() == list(range(5000))


def test_shard_of_a_sequence(store: ArtifactStore) -> None:
    stored = Stored(store, [5, 16, 1, 14, 3, 2, 9])
    reader = stored.write_all()
    digests = stored.sequences.digests
    assert reader.shard_of(digests[[6, 0, 2, 1]]).tolist() == [3, 0, 2, 1]
    with pytest.raises(RowsMismatchError, match="no teacher states for the sequence"):
        reader.shard_of(digests ^ 1)


def test_unknown_sequence_is_refused(store: ArtifactStore) -> None:
    reader = Stored(store, [5, 3]).write_all()
    for key in (b"\0" * 16, b"\xff" * 16):
        with pytest.raises(RowsMismatchError, match="no teacher states for the sequence"):
            reader.rows(key, np.zeros(5, np.int32))


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


def test_other_rows_than_planned_are_refused(store: ArtifactStore) -> None:
    stored = Stored(store, [5, 3])
    with pytest.raises(StoreError, match=r"planned with 5 rows of 6, the teacher gave \(4, 6\)"):
        stored.writer().write_shard(
            0, [stored.hidden[0][:4], stored.hidden[1]], [stored.targets[0][:4], stored.targets[1]]
        )
    with pytest.raises(StoreError, match="1 of 1 planned shards were not written"):
        stored.writer().close()


def test_sequences_out_of_order_are_refused() -> None:
    with pytest.raises(StoreError, match="not in the order of their digests"):
        Sequences(
            digests=np.zeros((2, 16), np.uint8),
            num_rows=np.ones(2, np.int32),
            source=np.zeros(2, np.int16),
            source_names=("a",),
        )


@pytest.mark.parametrize(
    ("hidden", "chunk", "shard"),
    [(1024, 256, 32768), (2048, 128, 16384), (4096, 64, 8192), (7168, 32, 4096)],
)
def test_default_sizes(hidden: int, chunk: int, shard: int) -> None:
    layout = plan_layout(
        hidden_size=hidden, num_rows=[], shard_rows=None, chunk_rows=None, codec="raw"
    )
    assert (layout.chunk_rows, layout.shard_rows) == (chunk, shard)
