"""Leases: one process computes, the others wait; a dead holder's lease is taken over."""

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import fsspec
import psutil
import pytest

import storage.lease
from configs.load import load_run
from storage.lease import exclusive, is_held
from storage.maintenance import damages, entries, remove_artifact
from storage.runs import list_runs, record_run
from storage.store import ArtifactStore
from tasks.execution.launch import launch_stage
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.stored import Stored

processes = multiprocessing.get_context("forkserver")


def local(folder: Path | str) -> ArtifactStore:
    return ArtifactStore(root=f"{folder}/store", scratch=f"{folder}/scratch")


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    yield ArtifactStore(root=root, scratch=str(tmp_path / "scratch"))
    fsspec.filesystem("memory").store.clear()


def append_slowly(folder: str, number: int) -> None:
    """Without a lease the lines of several processes would mix."""
    with exclusive(local(folder), "work", lambda _: None):
        path = Path(folder) / "log"
        for step in ("begin", "end"):
            with path.open("a") as file:
                file.write(f"{number} {step}\n")
            time.sleep(0.2)


def hold_for_ever(folder: str, held: Event) -> None:
    with exclusive(local(folder), "work", lambda _: None):
        held.set()
        time.sleep(600)


def test_processes_take_turns(tmp_path: Path) -> None:
    workers = [processes.Process(target=append_slowly, args=(str(tmp_path), k)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(lines) == 8
    assert [a.split()[0] for a in lines[::2]] == [b.split()[0] for b in lines[1::2]]
    assert not is_held(local(tmp_path), "work")


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    held = processes.Event()
    holder = processes.Process(target=hold_for_ever, args=(str(tmp_path), held))
    holder.start()
    assert held.wait(60)
    store = local(tmp_path)
    assert is_held(store, "work")
    waits: list[str] = []
    killer = threading.Timer(1.0, os.kill, (holder.pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    with exclusive(store, "work", waits.append):
        assert 0.9 < time.monotonic() - begin < 20
    holder.join()
    assert len(waits) == 1
    assert f"process {holder.pid} on " in waits[0]


def write_foreign(store: ArtifactStore, generation: int, beat: int) -> None:
    """As a holder on another machine does."""
    lease = {"id": "x", "host": "far-away", "place": "another boot", "pid": 1, "started": 0.0}
    content = json.dumps(lease | {"released": False, "beat": beat}).encode()
    store.write_whole(f"{store.root}/leases/work.{generation}.json", content)


def test_a_holder_elsewhere_that_no_longer_renews_is_followed(store: ArtifactStore) -> None:
    write_foreign(store, 3, 0)
    begin = time.monotonic()
    with exclusive(store, "work", lambda _: None, ttl_s=2.0):
        assert time.monotonic() - begin >= 2.0
        assert is_held(store, "work")
    assert not is_held(store, "work")


def test_a_holder_elsewhere_that_renews_is_waited_for(store: ArtifactStore) -> None:
    """Longer than the lease lasts without renewal."""
    write_foreign(store, 3, 0)

    def renew() -> None:
        for beat in range(1, 8):
            time.sleep(0.5)
            write_foreign(store, 3, beat)

    thread = threading.Thread(target=renew)
    thread.start()
    begin = time.monotonic()
    with exclusive(store, "work", lambda _: None, ttl_s=2.0):
        assert time.monotonic() - begin >= 3.5 + 2.0 - 0.6
    thread.join()


def test_a_holder_shows_that_it_lives(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.lease, "RENEW_S", 0.05)
    path = f"{store.root}/leases/work.0.json"
    with exclusive(store, "work", lambda _: None):
        seen = set()
        deadline = time.monotonic() + 20
        while len(seen) < 3:
            seen.add(store.fs.cat_file(path))
            assert time.monotonic() < deadline
    assert json.loads(store.fs.cat_file(path))["released"]


def test_who_was_overtaken_does_not_disturb_the_new_holder(store: ArtifactStore) -> None:
    with exclusive(store, "work", lambda _: None):
        write_foreign(store, 1, 0)  # another took this one for dead
        store.remove(f"{store.root}/leases/work.0.json")
    assert is_held(store, "work")
    assert store.fs.glob(f"{store.root}/leases/*") == [f"{store.root}/leases/work.1.json"]


def test_an_error_inside_frees_the_lease(store: ArtifactStore) -> None:
    with pytest.raises(KeyError), exclusive(store, "work", lambda _: None):
        raise KeyError
    assert not is_held(store, "work")


def test_two_launches_of_a_stage_compute_it_once(
    make_recipe: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(str(make_recipe()))
    spec = StageSpec(identity=plan_stages(run)["tokenize"], run=run, inputs={})
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO):
        refs = list(pool.map(launch_stage, [spec] * 2, [logging.getLogger("test")] * 2))
    assert refs[0] == refs[1]
    assert caplog.text.count("training and") == 1  # the stage's own message
    assert "is computing this artifact; waiting for it" in caplog.text
    assert "the artifact is there by now" in caplog.text


@pytest.mark.parametrize("step_s", [-3600.0, 1.0, 86400.0])
def test_a_step_of_the_systems_clock_takes_no_lease_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    """What psutil says of a start moves with the clock, as it adds the time of the boot."""
    store = local(tmp_path)
    with exclusive(store, "work", lambda _: None):
        boot = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + step_s)
        monkeypatch.setattr("psutil.boot_time", lambda: boot + step_s)
        monkeypatch.setattr("time.time", lambda: boot + step_s)
        assert is_held(store, "work")
    assert not is_held(store, "work")


@pytest.mark.parametrize("folder", ["a[b]c", "a*b", "what?", "[", "a{b,c}d", "**"])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str) -> None:
    """Leases, runs, artifacts and copies below a folder with any name."""
    store = local(tmp_path / folder)
    waits: list[str] = []
    with exclusive(store, "work", waits.append):
        assert is_held(store, "work")
    with exclusive(store, "work", waits.append):
        pass
    assert waits == []
    assert not is_held(store, "work")
    record_run(store, "run", {"tokens": "tokens/1"})
    assert [run.name for run in list_runs(store)] == ["run"]
    stored = Stored(store, [16, 9])
    stored.assert_readable(stored.write_all())
    assert [m.digest for m in store.newest_manifests("states", 9)] == [stored.digest]
    (entry,) = entries(store)
    assert list(damages(store, entry)) == []
    remove_artifact(store, entry)
    assert entries(store) == []


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\xff\xfe", b'{"pid": "x"}', b"7"])
def test_a_lease_file_with_odd_content_runs_out(store: ArtifactStore, content: bytes) -> None:
    store.write_whole(f"{store.root}/leases/work.0.json", content)
    with exclusive(store, "work", lambda _: None, ttl_s=1.0):
        assert is_held(store, "work")


def test_the_lease_of_a_holder_without_progress_runs_out(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.lease, "RENEW_S", 0.05)
    path = f"{store.root}/leases/work.0.json"

    def beats(seconds: float) -> int:
        seen, until = set(), time.monotonic() + seconds
        while time.monotonic() < until:
            seen.add(store.fs.cat_file(path))
            time.sleep(0.01)
        return len(seen)

    with exclusive(store, "work", lambda _: None, idle_s=0.5) as pulse:
        assert beats(0.4) > 2
        time.sleep(0.4)
        assert beats(0.5) == 1, "it was renewed without progress"
        pulse.touch()
        assert beats(0.4) > 2
