"""The flow `kd` as users start it: from the command line, again from cache, after a kill."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.load import load_run
from flows.cli import app
from tasks.stages.planning import plan_stages
from tests.command import kdflow
from tests.conftest import run_inline
from tests.faults.test_kill import kill_a_rank_after

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]


def cached_stages(output: str) -> set[str]:
    all_of_them = re.findall(r"^served from cache: (.*)$", output, re.MULTILINE)
    tasks = re.findall(r"Task run '(\w+)-\w+' - Finished in state Cached", output)
    return {*tasks, *(name for line in all_of_them for name in line.split(", "))}


def test_run_rerun_and_change(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(make_recipe())
    output = kdflow("run", recipe)
    assert cached_stages(output) == set()
    for words in ("teacher", "student before", "student after", "forward KL", "perplexity"):
        assert words in output
    assert re.search(r"\d+ of 6 steps", output)
    report = Path(re.findall(r"^report: (.*)$", output, re.MULTILINE)[-1]).read_text()
    for words in (
        "Held-out evaluation",
        "gradient norm",
        "tokens/s",
        "student after",
        "max_steps: 6",
    ):
        assert words in report
    assert not re.search(r"<script|<link|src=|@import", report)  # self-contained

    again = kdflow("run", recipe)
    assert cached_stages(again) == {"tokenize", "extract", "train", "evaluate", "report"}
    assert re.findall("student after .*│", again) == re.findall("student after .*│", output)

    changed = kdflow("run", recipe, "student.lr=1e-4")
    assert cached_stages(changed) == {"tokenize", "extract"}

    # A hit counts only while the artifact is whole.
    plan = plan_stages(load_run(recipe))
    states = tmp_path / "store/artifacts/states" / plan["extract"].digest
    next(states.rglob("hidden/c/0/0/0/0")).unlink()
    mended = kdflow("run", recipe)
    assert cached_stages(mended) == {"tokenize", "train", "evaluate", "report"}
    assert kdflow("plan", recipe).count("be served from cache") == 5
    assert_programs_can_read(recipe, tmp_path)


def assert_programs_can_read(recipe: str, folder: Path) -> None:
    """With `--json`, commands print objects, one a line, and nothing else."""

    def told(*arguments: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    store = ["store", "--root", f"{folder}/store", "--scratch", f"{folder}/scratch"]
    (done,) = told("run", recipe)
    assert Path(done["report"]).is_file()
    assert {row["model"] for row in done["evaluation"]} > {"student after"}
    plan = {stage["stage"]: stage for stage in told("plan", recipe, "student.lr=0.1")}
    assert plan["extract"]["cached"]
    assert not plan["train"]["cached"]
    assert plan["train"]["reasons"] == ["student.lr: 0.0001 -> 0.1"]
    stored = {artifact["artifact"]: artifact for artifact in told(*store, "ls")}
    student = stored[done["artifacts"]["student"]]
    assert student["bytes"] > 10_000
    assert student["state"] == "finished"
    (shown,) = told(*store, "show", student["artifact"])
    assert shown["manifest"]["counts"]["steps"] == 6
    assert told(*store, "gc") == []
    (config,) = told("config", recipe, "student.lr=0.1")
    assert config["student"]["lr"] == 0.1
    (field,) = told("config", "--explain", "student.lr_schedule")
    assert field["default"] == "cosine"
    assert {"recipe": "quickstart"} in told("recipes")
    assert {"what", "detail", "works"} == told("doctor")[0].keys()
    (estimate,) = told("estimate", recipe)
    assert estimate["steps"] == 6
    assert estimate["stored_bytes"]["raw"] > 0


def test_extraction_mapped_over_two_workers(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Each writes its share of the shards, and the whole is that of one worker, byte for byte."""
    small = {"storage.shard_rows": 32, "teacher.tokens_per_batch": 1}
    recipe = str(make_recipe(max_steps=1))
    shared = [f"{name}={value}" for name, value in small.items()]
    output = kdflow("run", recipe, *shared, "teacher.num_workers=2")
    assert len(set(re.findall(r"stage extract, portion (\d of 2)", output))) == 2
    there, planned = re.findall(r"(\d+) of (\d+) shards are there already", output)[-1]
    assert there == planned
    assert int(planned) > 10

    store = {"storage.root": str(tmp_path / "alone"), "storage.scratch": str(tmp_path / "s")}
    alone = Path(run_inline(load_run(recipe, small | store), until="extract")["states"].uri)
    states = tmp_path / "store/artifacts/states" / alone.name
    shards = [path.relative_to(alone) for path in alone.rglob("hidden/c/*/0/0/0")]
    assert len(shards) == int(planned)
    for shard in shards:
        assert (states / shard).read_bytes() == (alone / shard).read_bytes()


def test_a_killed_rank_is_started_again_from_its_checkpoint(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """By the task's retry. That it ends in the weights of an uninterrupted run: test_kill; of a
    whole run that is killed: test_interrupt.
    """
    recipe = str(make_recipe(max_steps=60, checkpoint_every=5))
    digest = plan_stages(load_run(recipe))["train"].digest
    checkpoints = tmp_path / "scratch/student" / digest / "checkpoints"
    killer = threading.Thread(target=kill_a_rank_after, args=(checkpoints, 10, 0))
    killer.start()
    output = kdflow("run", recipe)
    killer.join()
    assert "rank 0 of stage train ended by signal SIGKILL" in output
    assert "training from step 0 of 60" in output
    (resumed,) = re.findall(r"training from step (\d+) of 60 \(resumed", output)
    assert 10 <= int(resumed) < 60
    model = tmp_path / "store/artifacts/student" / digest / "model/model.safetensors"
    content = model.read_bytes()

    shutil.rmtree(model.parents[1])
    again = kdflow("run", recipe)
    assert cached_stages(again) == {"tokenize", "extract", "evaluate", "report"}
    assert "resumed" not in again
    assert model.read_bytes() == content
