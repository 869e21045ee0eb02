"""A stage killed mid-way goes on where it was: training from its checkpoint, to the same weights
bit for bit, and extraction behind its finished shards.
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from configs.load import load_run
from kdflow_core.errors import WorkerError
from kdflow_core.student.checkpoint import completed_steps, step_folder
from tasks.execution.launch import launch_stage
from tasks.presentation.tracking import HELDOUT_FILE, read_metrics
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline
from tests.processes import kill_a_rank_when

pytestmark = pytest.mark.ranks


def kill_a_rank_after(checkpoints: Path, step: int, victim: int) -> None:
    """Wait for a checkpoint, then SIGKILL one of this process's ranks."""
    kill_a_rank_when(lambda: max(completed_steps(checkpoints), default=0) >= step, victim)


@pytest.mark.parametrize(("num_ranks", "algorithm"), [(1, "dual_space"), (2, "self_distillation")])
def test_killed_training_ends_in_the_same_weights(
    make_recipe: Callable[..., Path],
    tmp_path: Path,
    student_folder: Path,
    num_ranks: int,
    algorithm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also of what an algorithm has of its own, which a checkpoint must hold: projectors, which
    learn, and a moving average of the student, of which a part is frozen. And where the result is
    an early student, the best of the held-out curve, whose checkpoint has to outlive newer ones; in
    that case another machine goes on, which has nothing but the store.
    """
    recipe = make_recipe(num_ranks=num_ranks, max_steps=40, checkpoint_every=5)
    overrides = {"algorithm.type": algorithm}
    keeps_best = algorithm == "dual_space"
    if keeps_best:  # training that soon does harm
        overrides |= {"student.lr": 2.0, "student.warmup_steps": 40}
        overrides |= {"eval.every_steps": 2, "eval.keep_best": "forward_kl"}
        overrides |= {"storage.checkpoints": "store"}
    if algorithm == "self_distillation":
        overrides |= {"teacher.model.path": str(student_folder), "algorithm.decay": 0.9}
        overrides |= {"student.parameter_groups": [{"names": "*embed_tokens*", "frozen": True}]}
    run = load_run(str(recipe), overrides)
    refs = run_inline(run, until="extract")
    other = {"storage.root": str(tmp_path / "whole"), "storage.scratch": str(tmp_path / "s")}
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    uninterrupted = load_run(str(recipe), overrides | other)
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
    *_, done = steps = completed_steps(checkpoints)
    assert 10 <= done < 40
    saved = FileSystemReader(step_folder(checkpoints, done)).read_metadata().state_dict_metadata
    embedding = "model.embed_tokens.weight"
    # Frozen weights are in the student's folder; their average is nowhere else.
    assert (f"model.model.{embedding}" in saved) == keeps_best
    assert any(name.endswith(embedding) for name in saved)

    if keeps_best:
        (tmp_path / "scratch").rename(tmp_path / "lost")
    with caplog.at_level(logging.INFO):
        resumed = Path(launch_stage(spec, log).uri)
    begun = int(caplog.text.partition("training from step ")[2].split()[0])
    assert begun in (steps if keeps_best else {done})  # the last one's copy may lack
    whole = Path(launch_stage(whole_spec, log).uri)
    for name in ("model.safetensors", "config.json"):
        assert (resumed / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    records = [read_metrics(folder / "metrics.jsonl") for folder in (resumed, whole)]
    assert [r["step"] for r in records[0]] == list(range(1, 41))
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    if keeps_best:
        curve = [p for p in read_metrics(resumed / HELDOUT_FILE) if p["step"]]
        best = min(curve, key=lambda point: point["forward_kl"])
        kept = json.loads((resumed / "manifest.json").read_text())["info"]["kept_step"]
        assert kept == best["step"] < 20
    assert not checkpoints.exists()
    assert not list(tmp_path.glob("*/checkpoints/*/*"))


def test_a_teacher_killed_mid_extraction_leaves_its_shards_to_the_next(
    make_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two SGLang ranks; afterwards the states are those of an uninterrupted extraction by one."""
    overrides = {
        "teacher.type": "sglang",
        "teacher.num_ranks": 2,
        "teacher.deterministic": True,
        "storage.shard_rows": 32,
    }
    run = load_run(str(make_recipe()), overrides)
    refs = run_inline(run, until="tokenize")
    whole = {"storage.root": str(tmp_path / "whole"), "storage.scratch": str(tmp_path / "s")}
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    spec = StageSpec(identity=plan_stages(run)["extract"], run=run, inputs=refs)
    alone = load_run(str(make_recipe()), overrides | whole | {"teacher.num_ranks": 1})
    whole_spec = StageSpec(identity=spec.identity, run=alone, inputs=refs)
    log = logging.getLogger("test")

    folder = tmp_path / "store/artifacts/states" / spec.identity.digest

    def three_shards_are_there() -> bool:
        return len(list((folder / "commits").glob("*.json"))) >= 3

    killer = threading.Thread(target=kill_a_rank_when, args=(three_shards_are_there,))
    killer.start()
    with pytest.raises(WorkerError, match="ended by signal SIGKILL"):
        launch_stage(spec, log)
    killer.join()
    finished = {path: path.stat().st_mtime_ns for path in (folder / "commits").glob("*.json")}
    assert len(finished) >= 3
    assert not (folder / "index.arrow").exists()

    with caplog.at_level(logging.INFO):
        resumed = Path(launch_stage(spec, log).uri)
    assert f"{len(finished)} of " in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    uninterrupted = Path(launch_stage(whole_spec, log).uri)
    shards = [path.relative_to(uninterrupted) for path in uninterrupted.rglob("hidden/c/*/0/0/0")]
    assert len(shards) > len(finished)
    for shard in shards:
        assert (resumed / shard).read_bytes() == (uninterrupted / shard).read_bytes()
