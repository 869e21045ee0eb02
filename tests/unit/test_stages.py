"""Stage identities: what starts a stage anew, what does not, and what `plan` says about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from storage.errors import StoreError
from tasks.stages.explanation import stage_status
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline

ALL = ("tokenize", "extract", "train", "evaluate", "report")


def digests(run: RunConfig) -> dict[str, str]:
    return {stage: identity.digest for stage, identity in plan_stages(run).items()}


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({}, ()),
        ({"student.lr": 0.1}, ("train", "evaluate", "report")),
        ({"loss.kd_ratio": 0.5}, ("train", "evaluate", "report")),
        ({"student.num_ranks": 4}, ("report",)),
        ({"student.micro_batch_tokens": 99, "loss.logits_memory_mb": 7}, ("report",)),
        ({"teacher.tokens_per_batch": 99}, ("report",)),
        ({"teacher.dtype": "bfloat16"}, ("extract", "train", "evaluate", "report")),
        ({"eval.max_generations": 0}, ("evaluate", "report")),
        ({"data.max_length": 100}, ALL),
        ({"data.max_length": 10_000}, ALL),
        ({"seed": 3}, ALL),
        ({"name": "other"}, ("report",)),
    ],
)
def test_which_stages_an_override_starts_anew(
    make_recipe: Callable[..., Path], overrides: dict[str, object], changed: tuple[str, ...]
) -> None:
    recipe = str(make_recipe())
    before, after = digests(load_run(recipe)), digests(load_run(recipe, overrides))
    assert tuple(stage for stage in before if before[stage] != after[stage]) == changed


def test_lengths_beyond_the_context_are_the_context(make_recipe: Callable[..., Path]) -> None:
    """The tiny models end at 256 tokens: any higher limit is the same run."""
    recipe = str(make_recipe())
    one = digests(load_run(recipe, {"data.max_length": 256}))
    two = digests(load_run(recipe, {"data.max_length": 9999}))
    assert one["tokenize"] == two["tokenize"]


def test_students_of_one_family_share_tokens_and_states(
    make_recipe: Callable[..., Path], teacher_folder: Path
) -> None:
    recipe = str(make_recipe())
    other = load_run(recipe, {"student.model.path": str(teacher_folder)})
    before, after = digests(load_run(recipe)), digests(other)
    assert before["extract"] == after["extract"]
    assert before["train"] != after["train"]


def test_new_weights_or_data_change_the_stages_that_read_them(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path, data_file: Path
) -> None:
    weights, data = tmp_path / "teacher", tmp_path / "data.jsonl"
    shutil.copytree(teacher_folder, weights)
    shutil.copy(data_file, data)
    paths = {"teacher.model.path": str(weights), "data.sources.0.path": str(data)}
    run = load_run(str(make_recipe()), paths)
    before = digests(run)
    file = weights / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    retrained = digests(run)
    assert before["tokenize"] == retrained["tokenize"]
    assert before["extract"] != retrained["extract"]
    with data.open("a") as handle:
        handle.write(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert digests(run)["tokenize"] != retrained["tokenize"]


def test_plan_says_what_is_cached_and_what_changed(make_recipe: Callable[..., Path]) -> None:
    recipe = str(make_recipe())
    run = load_run(recipe)
    first = {s.identity.stage: s for s in stage_status(run, plan_stages(run))}
    assert not any(s.cached for s in first.values())
    assert first["tokenize"].reasons == ("no artifact of this kind yet",)
    run_inline(run, until="extract")
    now = {s.identity.stage: s for s in stage_status(run, plan_stages(run))}
    assert now["tokenize"].cached
    assert now["extract"].cached
    assert not now["train"].cached
    changed = load_run(recipe, {"data.max_length": 100, "teacher.attention": "eager"})
    longer = stage_status(changed, plan_stages(changed))
    reasons = {s.identity.stage: s.reasons for s in longer}
    assert "student_limit: 128 -> 100" in reasons["tokenize"]
    assert "teacher.attention: sdpa -> eager" in reasons["extract"]
    assert any(r.startswith("input tokens: ") for r in reasons["extract"])


def test_plan_notices_damage(tiny_run: RunConfig) -> None:
    refs = run_inline(tiny_run, until="tokenize")
    (Path(refs["tokens"].uri) / "train.arrow").write_bytes(b"short")
    status = next(
        s for s in stage_status(tiny_run, plan_stages(tiny_run)) if s.identity.stage == "tokenize"
    )
    assert not status.cached
    assert "train.arrow has 5 bytes" in status.reasons[0]


def test_a_missing_data_file_is_refused_before_anything_runs(
    make_recipe: Callable[..., Path],
) -> None:
    run = load_run(str(make_recipe()), {"data.sources.0.path": "/nowhere/data.jsonl"})
    with pytest.raises(StoreError, match=r"no file at '/nowhere/data\.jsonl'"):
        plan_stages(run)


def test_a_missing_model_is_refused_before_anything_runs(make_recipe: Callable[..., Path]) -> None:
    run = load_run(str(make_recipe()), {"teacher.model.path": "/nowhere/model"})
    with pytest.raises(ModelError, match="no model folder '/nowhere/model'"):
        plan_stages(run)


def test_a_missing_package_is_refused_by_name(make_recipe: Callable[..., Path]) -> None:
    model = {"type": "gguf", "package": "no_such_package", "file": "x.gguf", "sha256": "0" * 64}
    with pytest.raises(ModelError, match="'no_such_package', which carries the model"):
        plan_stages(load_run(str(make_recipe()), {"teacher.model": model}))


def test_holding_a_source_out_makes_other_tokens(
    make_recipe: Callable[..., Path], tmp_path: Path, data_file: Path
) -> None:
    """And so does whatever a source says of its rows; its name alone makes no other states."""
    source = {"type": "files", "path": str(data_file)}
    sources = [source, source | {"name": "test"}]
    made = [
        digests(load_run(str(make_recipe()), {"data.sources": [sources[0], sources[1] | more]}))
        for more in ({}, {"heldout": True}, {"max_samples": 3}, {"layout": "prompt_completion"})
    ]
    assert len({own["tokenize"] for own in made}) == len(made)
