"""Metrics sinks: what a resumed run keeps, and what goes to Weights & Biases."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, load_run
from tasks.presentation.tracking import (
    HELDOUT_FILE,
    PLOTTED,
    MetricsLog,
    check_tracking,
    read_metrics,
)


def record(step: int) -> dict[str, Any]:
    return {"step": step} | dict.fromkeys(PLOTTED, float(step))


def test_a_resumed_run_drops_what_lies_behind_its_checkpoint(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = load_run(str(make_recipe()), {"tracking.tensorboard": False})
    log = MetricsLog(run=run, folder=tmp_path, run_id="x", first_step=0)
    for step in range(1, 6):
        log.write(record(step))
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    resumed = MetricsLog(run=run, folder=tmp_path, run_id="x", first_step=3)
    resumed.write(record(4))
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_resumed_run_keeps_the_held_out_points_before_its_checkpoint(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = load_run(str(make_recipe()), {"tracking.tensorboard": False})
    log = MetricsLog(run=run, folder=tmp_path, run_id="x", first_step=0)
    for step in (0, 2, 4):
        log.write_heldout({"reverse_kl": 1.0 / (1 + step)}, step)
    log.close()
    for first, kept in ((2, [0, 2]), (0, [])):  # from the beginning, all is measured anew
        log = MetricsLog(run=run, folder=tmp_path, run_id="x", first_step=first)
        log.close()
        assert [r["step"] for r in read_metrics(tmp_path / HELDOUT_FILE)] == kept


# wandb leaves sockets to its service process for the interpreter's end to close.
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_gets_the_metrics(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"tracking.wandb_project": "mine", "tracking.tensorboard": False}
    run = load_run(str(make_recipe()), settings)
    check_tracking(run)
    log = MetricsLog(run=run, folder=tmp_path / "m", run_id="abc", first_step=0)
    log.write(record(1))
    log.close()
    (written,) = (tmp_path / "m").rglob("*.wandb")
    deadline = time.monotonic() + 60
    while b"train/grad_norm" not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)  # on a busy machine its service writes after `finish`
    content = written.read_bytes()
    assert b"train/grad_norm" in content
    assert b"mine" in content


def test_a_tracker_that_is_not_installed_is_refused(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = load_run(str(make_recipe()), {"tracking.wandb_project": "mine"})
    with pytest.raises(ConfigError, match="needs the package wandb: pip install wandb"):
        check_tracking(run)
