"""A full disk: refused beforehand where it can be known, else one error and nothing lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from storage.errors import StoreFullError
from storage.store import ArtifactStore
from tests.conftest import run_inline


def test_states_that_will_not_fit_are_refused_before_the_teacher_runs(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(str(make_recipe()))
    run_inline(run, until="tokenize")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("storage.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        StoreFullError,
        match=r"hidden states needs .* GB, but .* free; point storage\.root .*check_room=false",
    ):
        run_inline(run, until="extract")


def on_small_disk(disk: Path, module: str, *arguments: str) -> dict[str, Any]:
    """What a module of this package prints that runs with a small tmpfs mounted at `disk`."""
    disk.mkdir()
    script = f'mount -t tmpfs -o size=3m tmpfs "{disk}" && exec "$@"'
    command = [sys.executable, "-m", f"tests.faults.{module}", *arguments, str(disk)]
    mapping = [] if os.geteuid() == 0 else ["--map-root-user"]
    result = subprocess.run(
        ["unshare", *mapping, "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_disk_that_fills_up_with_checkpoints(tmp_path: Path) -> None:
    """A real ENOSPC on a small tmpfs; the checkpoints before it stay."""
    outcome = on_small_disk(tmp_path / "disk", "save_on_full_disk")
    assert "no room left for a checkpoint" in outcome["error"]
    assert "storage.scratch" in outcome["error"]
    assert len(outcome["steps"]) >= 2


def test_a_disk_that_fills_up_during_extraction(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A real ENOSPC on a small tmpfs; the finished shards serve the next attempt."""
    outcome = on_small_disk(tmp_path / "disk", "extract_on_full_disk", str(make_recipe()))
    assert "no room left while writing" in outcome["error"]
    assert "what is finished stays" in outcome["error"]
    assert outcome["absent"] == "never finished"
    assert outcome["committed"] >= 2
    assert f"{outcome['committed']} of" in outcome["messages"][0]
    assert outcome["found"]


def test_an_error_that_is_not_about_room_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ArtifactStore(root=str(tmp_path / "file"), scratch=str(tmp_path))
    with pytest.raises(FileExistsError):
        store.write_whole(f"{tmp_path}/file/x", b"")
