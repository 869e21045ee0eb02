"""The store under faults: never a wrong row, never a lost finished shard, never a half-written
artifact taken for whole.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from storage.artifact import FileRecord
from storage.errors import StoreCorruptError, StoreError
from storage.maintenance import damages, find_entry, remove_damaged
from storage.states.files import FITTED
from storage.states.reader import HiddenStateReader
from storage.store import ArtifactStore
from tests.stored import Stored

COUNTS = [13] * 150
MANY = [13] * 800
processes = multiprocessing.get_context("forkserver")


def local(folder: Path | str) -> ArtifactStore:
    return ArtifactStore(root=f"{folder}/store", scratch=f"{folder}/scratch")


def write_what_is_missing(folder: str, counts: list[int], codec: str, begun: Event) -> None:
    stored = Stored(local(folder), counts, codec=codec)
    writer = stored.writer()
    missing = writer.missing_shards()
    begun.set()
    stored.write(writer, missing)
    stored.commit(writer)


def await_files(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < count:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_a_writer_killed_at_any_moment_loses_no_finished_shard(tmp_path: Path, codec: str) -> None:
    stored = Stored(local(tmp_path), MANY, codec=codec)
    commits = Path(stored.file("commits"))
    moments = random.Random(0)
    kills, finished = 0, {}
    while kills < 20:
        begun = processes.Event()
        writer = processes.Process(
            target=write_what_is_missing, args=(str(tmp_path), MANY, codec, begun)
        )
        writer.start()
        begun.wait(60)
        await_files(commits, len(finished) + moments.randrange(6))
        time.sleep(moments.uniform(0, 0.005))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        kills += 1
        assert stored.store.find("states", stored.digest) is None
        now = {p.name: p.stat().st_mtime_ns for p in commits.glob("*.json")}
        assert finished.items() <= now.items()
        finished = now
    assert 0 < len(finished) < len(MANY)
    stored.finish()
    now = {p.name: p.stat().st_mtime_ns for p in commits.glob("*.json")}
    assert finished.items() <= now.items()
    stored.assert_readable(stored.reader())


def race(folder: str, seed: int, begin: Event) -> None:
    stored = Stored(local(folder), COUNTS)
    shift = np.uint16(seed)
    stored.hidden = [rows ^ shift for rows in stored.hidden]  # a teacher that is not deterministic
    writer = stored.writer()
    begin.wait(60)
    stored.write(writer, list(range(len(COUNTS))))


def test_two_writers_of_the_same_shards_leave_each_shard_to_one_of_them(tmp_path: Path) -> None:
    begin = processes.Event()
    writers = [processes.Process(target=race, args=(str(tmp_path), k, begin)) for k in (0, 1)]
    for writer in writers:
        writer.start()
    time.sleep(1)
    begin.set()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    stored = Stored(local(tmp_path), COUNTS)
    stored.finish()
    reader = stored.reader()
    for key, hidden, targets in zip(stored.keys, stored.hidden, stored.targets, strict=True):
        rows = reader.rows(key, targets)
        assert np.array_equal(rows, hidden) or np.array_equal(rows, hidden ^ np.uint16(1))
    assert list(damages(stored.store, find_entry(stored.store, stored.digest))) == []


def test_a_reader_during_a_write_sees_nothing_or_everything(tmp_path: Path) -> None:
    begun = processes.Event()
    writer = processes.Process(
        target=write_what_is_missing, args=(str(tmp_path), COUNTS, "raw", begun)
    )
    writer.start()
    stored = Stored(local(tmp_path), COUNTS)
    looks = 0
    while (ref := stored.store.find("states", stored.digest)) is None:
        looks += 1
        assert writer.is_alive() or stored.store.find("states", stored.digest)
    assert looks > 1
    assert ref.kind == "states"
    stored.assert_readable(stored.reader())
    writer.join()


def files_of(codec: str) -> list[str]:
    names = [
        "states.zarr/hidden/c/1/0/0/0",
        "states.zarr/target_ids/c/1/0",
        "states.zarr/zarr.json",
        "states.zarr/hidden/zarr.json",
        "commits/000001.json",
        "index.arrow",
        "manifest.json",
    ]
    return names + ([FITTED] if codec == "int8" else [])


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[int(float(how) * (len(content) - 1))] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["0.02", "0.3", "0.7", "1.0", "cut", "empty", "gone"])
@pytest.mark.parametrize("codec", ["raw", "planes", "int8"])
def test_damage_to_any_file_is_found_and_mended(tmp_path: Path, codec: str, how: str) -> None:
    """A number is where in the file one bit is flipped."""
    whole = Stored(local(tmp_path / "whole"), [16, 16, 9], codec=codec)
    expected = [
        whole.write_all().rows(key, targets)
        for key, targets in zip(whole.keys, whole.targets, strict=True)
    ]
    for number, name in enumerate(files_of(codec)):
        stored = Stored(local(tmp_path / str(number)), [16, 16, 9], codec=codec)
        stored.finish()
        path = Path(stored.file(name))
        before = path.read_bytes()
        damage(path, how)
        read_right_or_refuse(stored, expected)
        entry = find_entry(stored.store, stored.digest)
        if entry.manifest is not None:
            bad: list[FileRecord] = [record for record, _ in damages(stored.store, entry)]
            assert [record.path for record in bad] == [name]
            remove_damaged(stored.store, entry, bad)
        untouched = Path(stored.file("states.zarr/hidden/c/0/0/0/0")).stat().st_mtime_ns
        stored.finish()
        if name != "manifest.json":
            assert path.read_bytes() == before
        assert list(damages(stored.store, find_entry(stored.store, stored.digest))) == []
        if name != FITTED:  # without it no shard can be read
            other = Path(stored.file("states.zarr/hidden/c/0/0/0/0"))
            assert other.stat().st_mtime_ns == untouched
        assert read_right_or_refuse(stored, expected) == len(expected)


def read_right_or_refuse(stored: Stored, expected: list[np.ndarray]) -> int:
    """How many sequences are read, by whoever does not look at the files' sizes first; none of
    them wrongly.
    """
    right = 0
    for key, targets, rows in zip(stored.keys, stored.targets, expected, strict=True):
        try:
            ref = stored.store.ref(stored.store.manifest("states", stored.digest))
            found = HiddenStateReader(store=stored.store, ref=ref).rows(key, targets)
        except StoreError:
            continue
        np.testing.assert_array_equal(found, rows)
        right += 1
    return right


def test_exchanged_shards_are_refused(tmp_path: Path) -> None:
    stored = Stored(local(tmp_path), [16, 16])
    stored.finish()
    one, two = (Path(stored.file(f"states.zarr/hidden/c/{k}/0/0/0")) for k in (0, 1))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="not those that were written"):
        stored.reader().rows(stored.keys[0], stored.targets[0])


READ_ONLY = """
import sys
from pathlib import Path
import pytest
from storage.errors import StoreError
from storage.runs import record_run
from tests.faults.test_store_faults import local
from tests.stored import Stored
stored = Stored(local(sys.argv[1]), [16, 9])
stored.assert_readable(stored.reader())
record_run(stored.store, "replay", {})
with pytest.raises(StoreError, match="cannot be written .Read-only file system.; finished"):
    Stored(local(sys.argv[1]), [5], seed=1).finish()
"""


def test_a_read_only_store_can_be_read(tmp_path: Path) -> None:
    """Really mounted read-only."""
    Stored(local(tmp_path), [16, 9]).finish()
    script = f'mount --bind -o ro "{tmp_path}" "{tmp_path}" && exec "$@"'
    mapping = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = [sys.executable, "-c", READ_ONLY, str(tmp_path)]
    subprocess.run(
        ["unshare", *mapping, "--mount", "sh", "-c", script, "sh", *command],
        check=True,
    )
