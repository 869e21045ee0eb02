"""A remote store is read through local copies that take no more room than they may."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from storage.errors import StoreCorruptError
from storage.states.reader import HiddenStateReader
from storage.store import ArtifactStore
from tests.stored import Stored


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    """20 shards of one sequence in a store that is not local."""
    store = ArtifactStore(root=f"memory://{tmp_path.name}", scratch=str(tmp_path))
    stored = Stored(store, [16] * 20, hidden=32)
    stored.finish()
    yield stored
    fsspec.filesystem("memory").store.clear()


def copies(stored: Stored) -> dict[str, int]:
    """The local copies, by name, with their sizes."""
    folder = stored.store.scratch / "read-cache/states" / stored.digest
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def test_what_is_read_is_fetched_once(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = stored.store.fs.get_file

    def get_file(source: str, target: str) -> None:
        fetched.append(source)
        fetch(source, target)

    monkeypatch.setattr(stored.store.fs, "get_file", get_file)
    reader = stored.reader()
    reader.rows(stored.keys[3], stored.targets[3])
    of_shards = [source for source in fetched if "/c/" in source]
    assert len(of_shards) == 2
    assert all("/c/3/" in source for source in of_shards)
    before = len(fetched)
    stored.reader().rows(stored.keys[3], stored.targets[3])
    assert len(fetched) == before


def test_copies_stay_within_their_limit(stored: Stored) -> None:
    ref = stored.store.find("states", stored.digest)
    assert ref is not None
    limit = ref.num_bytes // 2
    reader = HiddenStateReader(store=stored.store, ref=ref, cache_bytes=limit)
    for _ in range(2):
        stored.assert_readable(reader)
        assert 0 < sum(copies(stored).values()) <= limit


def test_rows_stay_when_their_copy_makes_room(stored: Stored) -> None:
    """As another process would, reading something else."""
    ref = stored.store.find("states", stored.digest)
    assert ref is not None
    reader = HiddenStateReader(store=stored.store, ref=ref, cache_bytes=ref.num_bytes // 4)
    first = reader.rows(stored.keys[0], stored.targets[0])
    expected = first.copy()
    stored.assert_readable(reader)
    assert "states.zarr/hidden/c/0/0/0/0" not in copies(stored)
    assert (first == expected).all()


def test_a_copy_that_was_cut_off_is_fetched_again(stored: Stored) -> None:
    stored.reader().rows(stored.keys[3], stored.targets[3])
    (copy,) = stored.store.scratch.rglob("hidden/c/3/0/0/0")
    copy.write_bytes(copy.read_bytes()[:10])
    stored.assert_readable(stored.reader())


def test_what_is_gone_or_cut_off_in_the_store_is_refused(stored: Stored) -> None:
    reader = stored.reader()
    name = stored.file("states.zarr/hidden/c/3/0/0/0")
    stored.store.fs.pipe_file(name, stored.store.fs.cat_file(name)[:10])
    with pytest.raises(StoreCorruptError, match="has 10 bytes, recorded were"):
        reader.rows(stored.keys[3], stored.targets[3])
    stored.store.fs.rm_file(name)
    with pytest.raises(StoreCorruptError, match="is gone"):
        reader.rows(stored.keys[3], stored.targets[3])
