"""Training killed mid-way goes on from its checkpoint, to the same weights bit for bit."""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.load import load_run
from kdflow_core.errors import WorkerError
from kdflow_core.student.checkpoint import completed_steps
from tasks.launch import launch_stage
from tasks.stages import StageSpec, plan_stages
from tasks.tracking import read_metrics
from tests.conftest import run_inline

pytestmark = pytest.mark.ranks


def kill_a_rank_after(checkpoints: Path, step: int, victim: int) -> None:
    """Wait for a checkpoint, then SIGKILL one of this process's ranks."""
    deadline = time.monotonic() + 240
    while max(completed_steps(checkpoints), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [p for p in psutil.Process().children() if "tasks.worker" in p.cmdline()]
    os.kill(sorted(p.pid for p in ranks)[victim], signal.SIGKILL)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_training_ends_in_the_same_weights(
    make_recipe: Callable[..., Path], tmp_path: Path, num_ranks: int
) -> None:
    recipe = make_recipe(num_ranks=num_ranks, max_steps=40, checkpoint_every=5)
    run = load_run(str(recipe))
    refs = run_inline(run, until="extract")
    other = {"storage.root": str(tmp_path / "whole"), "storage.scratch": str(tmp_path / "s")}
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    uninterrupted = load_run(str(recipe), other)
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=refs)
    whole_spec = StageSpec(identity=spec.identity, run=uninterrupted, inputs=refs)
    log = logging.getLogger("test")

    checkpoints = tmp_path / "scratch/student" / spec.identity.digest / "checkpoints"
    killer = threading.Thread(target=kill_a_rank_after, args=(checkpoints, 10, num_ranks - 1))
    killer.start()
    with pytest.raises(WorkerError, match="ended by signal SIGKILL"):
        launch_stage(spec, log)
    killer.join()
    assert not (
        tmp_path / "store/artifacts/student" / spec.identity.digest / "manifest.json"
    ).exists()
    done = completed_steps(checkpoints)[-1]
    assert 10 <= done < 40

    resumed = Path(launch_stage(spec, log).uri)
    whole = Path(launch_stage(whole_spec, log).uri)
    for name in ("model.safetensors", "config.json"):
        assert (resumed / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    records = [read_metrics(folder / "metrics.jsonl") for folder in (resumed, whole)]
    assert [r["step"] for r in records[0]] == list(range(1, 41))
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    assert not checkpoints.exists()
