"""The form of the stored states, and the order in which they are read, in whole trainings."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import WorkerError
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.presentation.tracking import read_metrics
from tasks.stages.identity import StageSpec, open_store
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline
from tests.faults.test_kill import kill_a_rank_after

pytestmark = pytest.mark.ranks


def trained(run: RunConfig, inputs: dict[str, ArtifactRef]) -> tuple[list[float], bytes]:
    """The losses, and the student's weights."""
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=inputs)
    folder = Path(launch_stage(spec, logging.getLogger("test")).uri)
    records = read_metrics(folder / "metrics.jsonl")
    return [r["loss"] for r in records], (folder / "model/model.safetensors").read_bytes()


def test_a_lossless_codec_changes_nothing_and_a_lossy_one_little(
    make_recipe: Callable[..., Path],
) -> None:
    results, sizes, infos = {}, {}, {}
    for codec in ("raw", "planes", "int8"):
        run = load_run(str(make_recipe()), {"storage.codec": codec})
        refs = run_inline(run, until="extract")
        results[codec] = trained(run, refs)
        infos[codec] = open_store(run).manifest("states", refs["states"].digest)
        shards = [f for f in infos[codec].files if "hidden/c/" in f.path]
        sizes[codec] = sum(f.num_bytes for f in shards)
    assert results["planes"] == results["raw"]
    assert results["int8"][0] == pytest.approx(results["raw"][0], rel=0.02)
    assert results["int8"] != results["raw"]
    assert sizes["planes"] < 0.75 * sizes["raw"]
    assert sizes["int8"] < 0.6 * sizes["raw"]
    loss = infos["int8"].info["codec_loss"]
    assert 0 < loss["kl_mean"] <= loss["kl_max"] < 0.05
    assert 0.8 < loss["same_top1"] <= 1
    assert loss["rows"] >= 64
    assert "codec_loss" not in infos["planes"].info


def test_what_a_consumer_must_check_is_in_the_manifest(
    make_recipe: Callable[..., Path], teacher_folder: Path
) -> None:
    run = load_run(str(make_recipe()))
    refs = run_inline(run, until="extract")
    manifest = open_store(run).manifest("states", refs["states"].digest)
    info = manifest.info
    assert info["teacher"]["model"]["path"] == str(teacher_folder)
    assert info["teacher"]["digest"] == manifest.inputs["teacher_model"]
    assert len(info["teacher"]["tokenizer"]) == len(info["head"]["digest"]) == 32
    assert "template" in info["teacher"]
    assert info["final_norm_applied"] is True
    assert info["layout"]["codec"] == "raw"
    assert info["dtype"] == "float32"
    assert manifest.counts["tokens"] > manifest.counts["rows"] > manifest.counts["sequences"]
    assert refs["states"].num_bytes > manifest.counts["rows"] * 48 * 2
    assert manifest.schema_version == 2


@pytest.mark.slow  # resuming: test_kill; the windowed order: tests/unit/test_schedule
def test_a_windowed_shuffle_resumes_to_the_same_weights(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed and resumed, it goes on in the order of the uninterrupted run, on two ranks."""
    settings = {"num_ranks": 2, "max_steps": 150, "checkpoint_every": 5, "shuffle_window_shards": 2}
    recipe = str(make_recipe(**settings))
    small = {"storage.shard_rows": 64}
    run = load_run(recipe, small)
    refs = run_inline(run, until="extract")
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    other = {"storage.root": str(tmp_path / "whole"), "storage.scratch": str(tmp_path / "s")}
    whole = trained(load_run(recipe, small | other), refs)
    full = load_run(str(make_recipe(**settings | {"shuffle_window_shards": None})), small | other)
    assert trained(full, refs)[0] != whole[0]

    digest = plan_stages(run)["train"].digest
    checkpoints = tmp_path / "scratch/student" / digest / "checkpoints"
    killer = threading.Thread(target=kill_a_rank_after, args=(checkpoints, 5, 1))
    killer.start()
    with pytest.raises(WorkerError, match="ended by signal SIGKILL"):
        trained(run, refs)
    killer.join()
    assert trained(run, refs) == whole
