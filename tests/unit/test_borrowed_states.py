"""Shards that another artifact has are taken over; the artifact is whole without the other."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.maintenance import damages, find_entry, remove_artifact, remove_damaged
from storage.states.borrowing import BORROWED
from storage.states.files import INDEX, hidden_file, targets_file
from storage.store import ArtifactStore
from tests.stored import Stored

FULL = [16, 7, 9, 12, 4, 16, 5, 11]  # five shards of 16 rows, in whatever order
NEW = [3, 16, 8, 2]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    yield ArtifactStore(root=root, scratch=str(tmp_path / "scratch"))
    fsspec.filesystem("memory").store.clear()


def local(folder: Path) -> ArtifactStore:
    return ArtifactStore(root=str(folder / "store"), scratch=str(folder / "scratch"))


def next_night(first: Stored, counts: list[int], seed: int = 1) -> Stored:
    """What the first holds and `counts` more."""
    codec = first.layout.codec
    return Stored(first.store, counts, seed=seed, codec=codec).with_rows_of(first)


def finish_behind(night: Stored, *lenders: Stored) -> tuple[int, list[int]]:
    """Write what is missing and commit; how many shards were taken over, and which written."""
    writer = night.borrowing_writer(*lenders)
    taken, missing = writer.borrow(), writer.missing_shards()
    night.write(writer, missing)
    night.commit(writer)
    return taken, missing


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_full_shards_are_taken_over(store: ArtifactStore, codec: str) -> None:
    first = Stored(store, FULL, codec=codec)
    first.finish()
    night = next_night(first, NEW)
    taken, missing = finish_behind(night, first)
    assert taken > 2
    assert missing == list(range(taken, night.layout.num_shards))
    new_rows = sum(NEW) + sum(FULL) - 8 * taken  # what is taken holds at least half a shard
    assert len(missing) <= 2 * (1 + new_rows // 16)
    night.assert_readable(night.reader())
    remove_artifact(store, find_entry(store, f"states/{first.digest}"))
    night.assert_readable(night.reader())
    entry = find_entry(store, f"states/{night.digest}")
    assert not list(damages(store, entry))


def test_what_is_taken_over_takes_no_room_and_any_zarr_reader_opens_it(tmp_path: Path) -> None:
    first = Stored(local(tmp_path), FULL)
    first.finish()
    night = next_night(first, NEW)
    taken, missing = finish_behind(night, first)
    mine, other = (find_entry(first.store, f"states/{s.digest}") for s in (night, first))
    shared = [mine.files[name(k)] for k in range(taken) for name in (hidden_file, targets_file)]
    assert mine.num_bytes - mine.own_bytes == sum(shared) == other.num_bytes - other.own_bytes
    links = [os.stat(night.file(hidden_file(k))).st_nlink for k in range(night.layout.num_shards)]
    assert links == [2] * taken + [1] * len(missing)
    hidden = zarr.open_group(night.file("states.zarr"), mode="r")["hidden"]
    assert isinstance(hidden, zarr.Array)
    assert hidden.shape[0] == night.layout.num_shards
    places = night.reader().places(night.sequences.digests)
    for number, rows_NH in enumerate(night.hidden):
        shard = int(places.shard[number])
        begin = int(places.first_row[number]) - shard * night.layout.shard_rows
        found = np.asarray(hidden[shard, 0, begin : begin + len(rows_NH)])
        np.testing.assert_array_equal(found, rows_NH)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    nights=st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=8), min_size=2, max_size=5)
)
def test_night_after_night(
    tmp_path_factory: pytest.TempPathFactory, nights: list[list[int]]
) -> None:
    """Each holds all before; also where they hold no rows, or little."""
    store = local(tmp_path_factory.mktemp("nights"))
    done: list[Stored] = []
    for seed, counts in enumerate(nights):
        night = Stored(store, counts, seed=seed)
        if done:
            night = night.with_rows_of(done[-1])
        finish_behind(night, *reversed(done))
        night.assert_readable(night.reader())
        assert night.layout.num_shards <= 2 * (1 + night.layout.num_rows // 8)
        done.append(night)
    for night in done[:-1]:
        shutil.rmtree(store.folder("states", night.digest))
    done[-1].assert_readable(done[-1].reader())


def test_shards_of_a_lossy_codec_bring_their_scales(tmp_path: Path) -> None:
    """Those that were made with other scales are left. What was measured of them is kept."""
    store = local(tmp_path)
    first, other = (Stored(store, FULL, seed=seed, codec="int8") for seed in (0, 1))
    for stored in (first, other):
        writer = stored.writer()
        for shard in writer.missing_shards():
            numbers = writer.sequences_of(shard)
            parts = [stored.hidden[i] for i in numbers], [stored.targets[i] for i in numbers]
            writer.write_shard(shard, *parts, lambda exact, _: {"shape": float(len(exact))})
        stored.commit(writer)
    night = Stored(store, NEW, seed=2, codec="int8").with_rows_of(first).with_rows_of(other)
    writer = night.borrowing_writer(first, other)
    taken = writer.borrow()
    assert 2 < taken <= first.layout.num_shards
    night.write(writer, writer.missing_shards())
    _, measured = writer.close()
    assert len(measured) == taken
    night.commit(writer)
    before, after = first.reader(), night.reader()
    assert np.array_equal(before.fitted, after.fitted)
    assert not np.array_equal(other.reader().fitted, after.fitted)
    for key, targets in zip(first.keys, first.targets, strict=True):
        np.testing.assert_array_equal(after.rows(key, targets), before.rows(key, targets))
    for key, targets in zip(night.keys, night.targets, strict=True):
        assert len(after.rows(key, targets)) == len(targets)


def test_an_attempt_that_goes_on_takes_what_was_settled(tmp_path: Path) -> None:
    """Also where the lender has gone meanwhile, or others have come."""
    store = local(tmp_path)
    first = Stored(store, FULL)
    first.finish()
    night = next_night(first, NEW)
    killed = night.borrowing_writer(first)
    expected = killed.layout.num_shards
    night.write(killed, [expected - 1])
    shutil.rmtree(store.folder("states", first.digest))
    other = Stored(store, [16, 16], seed=7)
    other.finish()
    again = next_night(first, NEW)
    writer = again.borrowing_writer(other)
    assert writer.borrow() == 0
    assert writer.missing_shards() == list(range(expected - 1))
    again.write(writer, writer.missing_shards())
    again.commit(writer)
    again.assert_readable(again.reader())


def test_an_attempt_of_before_takes_nothing_over(tmp_path: Path) -> None:
    """Its shards are where they would be without others."""
    store = local(tmp_path)
    first = Stored(store, FULL)
    first.finish()
    night = next_night(first, NEW)
    writer = night.writer()
    night.write(writer, [0])
    taken, missing = finish_behind(night, first)
    assert taken == 0
    assert missing == list(range(1, night.layout.num_shards))
    night.assert_readable(night.reader())


@pytest.mark.parametrize(
    "name", [BORROWED, INDEX, hidden_file(0), hidden_file(4), "commits/000001.json"]
)
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_what_is_damaged_is_written_again_and_nothing_else(
    tmp_path: Path, name: str, how: str
) -> None:
    store = local(tmp_path)
    first = Stored(store, FULL)
    first.finish()
    night = next_night(first, NEW)
    finish_behind(night, first)
    shutil.rmtree(store.folder("states", first.digest))
    path = Path(night.file(name))
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    entry = find_entry(store, f"states/{night.digest}")
    damaged = [record for record, _ in damages(store, entry)]
    assert [record.path for record in damaged] == [name]
    remove_damaged(store, entry, damaged)
    _, missing = finish_behind(night)
    shard = {hidden_file(0): [0], hidden_file(4): [4], "commits/000001.json": [1]}
    assert missing == shard.get(name, [])
    night.assert_readable(night.reader())


def test_on_a_file_system_without_links_shards_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Stored(local(tmp_path), FULL)
    first.finish()
    night = next_night(first, NEW)
    writer = night.borrowing_writer(first)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refused)
        assert writer.borrow() == 0
    night.write(writer, writer.missing_shards())
    night.commit(writer)
    night.assert_readable(night.reader())


def test_shards_of_other_layouts_are_left(tmp_path: Path) -> None:
    store = local(tmp_path)
    for seed, other in enumerate(
        [{"codec": "planes"}, {"shard_rows": 32}, {"chunk_rows": 8}], start=10
    ):
        first = Stored(store, FULL, seed=seed, **other)  # type: ignore[arg-type]
        first.finish()
        night = Stored(store, NEW, seed=seed + 100).with_rows_of(first)
        assert night.borrowing_writer(first).borrow() == 0
