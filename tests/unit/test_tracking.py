"""Metrics sinks: what a resumed run keeps, and what goes to Weights & Biases."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, load_run
from configs.schema.run import RunConfig
from tasks.presentation import trackers
from tasks.presentation.gauges import Gauges
from tasks.presentation.trackers import KINDS, check_tracking
from tasks.presentation.tracking import HELDOUT_FILE, PLOTTED, MetricsLog, read_metrics
from tests.conftest import run_inline

ROOT = Path(__file__).parents[2]


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


def logged(run: RunConfig, folder: Path, *, first: int, last: int) -> list[str]:
    """What is told of a training that goes from one step to another."""
    told: list[str] = []
    log = MetricsLog(run=run, folder=folder, run_id="abc", first_step=first, tell=told.append)
    for step in range(first + 1, last + 1):
        log.write(record(step))
    log.write_heldout({"forward_kl": 0.25}, last)
    log.close()
    return told


def test_mlflow_gets_the_metrics_of_both_parts_of_a_resumed_run(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    settings = {"tracking.mlflow_experiment": "mine", "tracking.tensorboard": False}
    run = load_run(str(make_recipe()), settings)
    check_tracking(run)
    assert not logged(run, tmp_path / "m", first=0, last=2)
    assert not logged(run, tmp_path / "m", first=2, last=3)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "tiny"
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert {m.step: m.value for m in losses} == {1: 1.0, 2: 2.0, 3: 3.0}
    assert found.data.metrics["heldout/forward_kl"] == 0.25
    assert found.data.params["student.lr"] == "0.003"
    assert found.data.params["loss.divergence.type"] == "forward_kl"
    assert not list(tmp_path.rglob("mlruns")), "no files beside"


def test_a_tracker_that_does_not_answer_ends_no_training(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("", 0)) as taken:
        settings = {
            "tracking.mlflow_experiment": "mine",
            "tracking.prometheus_port": taken.getsockname()[1],
        }
        told = logged(load_run(str(make_recipe()), settings), tmp_path, first=0, last=2)
    assert len(told) == 2
    assert "MLflow does not have all figures of this training" in told[0]
    assert "no figures for Prometheus: port" in told[1]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_trackio_gets_the_metrics(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own: where it writes, it takes from the environment when it is loaded."""
    code = (
        "import sys; from pathlib import Path; from configs.load import load_run;"
        "from tests.unit.test_tracking import logged;"
        "run = load_run(sys.argv[1], {'tracking.trackio_project': 'mine'});"
        "logged(run, Path('m'), first=0, last=2); logged(run, Path('m'), first=2, last=3)"
    )
    command = [sys.executable, "-c", code, str(make_recipe())]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    with closing(sqlite3.connect(tmp_path / "mine.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id")
        found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert {name for name, _, _ in found} == {"tiny-abc"}
    losses = {step: m["train/loss"] for _, step, m in found if "train/loss" in m}
    assert losses == {1: 1.0, 2: 2.0, 3: 3.0}


def test_prometheus_finds_the_last_metrics(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    run = load_run(str(make_recipe()), {"tracking.prometheus_port": port})
    log = MetricsLog(run=run, folder=tmp_path, run_id="abc", first_step=0)
    for step in (1, 2):
        log.write(record(step))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    log.close()
    assert 'kdflow_train_tokens_per_s{run="tiny"} 2.0' in text
    assert 'kdflow_step{run="tiny"} 2.0' in text


def test_prometheus_finds_where_a_stage_is(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks, each at its share; then of another count."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    run = load_run(str(make_recipe()), {"tracking.prometheus_port": port})
    gauges, now = Gauges(run, "extract", pytest.fail), iter(range(10, 100, 10))
    monkeypatch.setattr("tasks.presentation.gauges.time.monotonic", lambda: float(next(now)))

    def progress(rank: int, done: int, unit: str = "tokens", **more: object) -> str:
        event = {"event": "progress", "rank": rank, "done": done, "total": 500, "unit": unit}
        gauges.event(event | more)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return str(answer.read().decode())

    progress(0, 100)
    progress(1, 200)
    text = progress(1, 400, gpu_bytes=7, figures={"queue": 2, "waiting": 0.25})
    of_stage = 'run="tiny",stage="extract"'
    assert f'kdflow_stage_done{{rank="1",{of_stage},unit="tokens"}} 400.0' in text
    assert f'kdflow_stage_total{{rank="0",{of_stage},unit="tokens"}} 500.0' in text
    assert f'kdflow_stage_per_s{{{of_stage},unit="tokens"}} 10.0' in text  # 200 in 20 seconds
    assert f'kdflow_gpu_bytes{{rank="1",{of_stage}}} 7.0' in text
    assert f'kdflow_stage_queue{{rank="1",{of_stage}}} 2.0' in text
    assert f'kdflow_stage_waiting{{rank="1",{of_stage}}} 0.25' in text
    progress(0, 5, unit="steps")
    assert f'kdflow_stage_per_s{{{of_stage},unit="steps"}} 0.1' in progress(0, 6, unit="steps")


@pytest.mark.ranks
def test_all_stages_of_a_run_are_found_at_its_port(make_recipe: Callable[..., Path]) -> None:
    """By the process that starts their ranks, training with its figures."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    run = load_run(str(make_recipe(num_ranks=2)), {"tracking.prometheus_port": port})
    run_inline(run, until="train", launched=["tokenize", "extract", "train"])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    for stage in ("tokenize", "extract", "train"):
        assert re.search(rf'kdflow_stage_done{{.*stage="{stage}".*}} [1-9]', text), stage
    assert re.search(r'kdflow_stage_waiting{rank="0".*stage="extract"} 0', text)
    assert re.search(r'kdflow_train_loss{run="tiny"} \d', text)
    assert re.search(r'kdflow_train_waiting{run="tiny"} 0\.', text)
    assert 'kdflow_step{run="tiny"} 6.0' in text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.field)
def test_a_tracker_that_is_not_installed_is_refused(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == kind.module else name)
    given = {"tensorboard": True, "prometheus_port": 9090}.get(kind.field, "mine")
    run = load_run(
        str(make_recipe()), {"tracking.tensorboard": False, f"tracking.{kind.field}": given}
    )
    with pytest.raises(ConfigError, match=f"needs the package {kind.package}: pip install"):
        check_tracking(run)
