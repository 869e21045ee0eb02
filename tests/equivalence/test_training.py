"""Runs that should be equal are equal: any division of the work, and an independent loop."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.contracts import TokenSequence
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.execution.launch import launch_stage
from tasks.presentation.tracking import HELDOUT_FILE, read_metrics
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests import naive
from tests.conftest import make_llama, run_inline
from tests.small_training import NARROW
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.ranks

# float32 sums taken in another order differ by about 1e-7 a step; six steps of Adam multiply that.
RTOL = 1e-4


def train(run: RunConfig, inputs: dict[str, ArtifactRef]) -> Path:
    """Run the train stage in worker processes; the artifact's folder."""
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=inputs)
    return Path(launch_stage(spec, logging.getLogger("test")).uri)


@pytest.fixture
def variant(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[RunConfig, dict[str, ArtifactRef], Path]]:
    """Trains a variant of the tiny run in a store of its own, which has tokens and states."""
    base = run_inline(load_run(str(make_recipe())), until="extract")

    def make(number: int, **student: Any) -> tuple[RunConfig, dict[str, ArtifactRef], Path]:
        root = tmp_path / f"store-{number}"
        shutil.copytree(tmp_path / "store", root)
        overrides = {"storage.root": str(root), "storage.scratch": str(tmp_path / f"s-{number}")}
        run = load_run(str(make_recipe(**student)), overrides)
        return run, base, train(run, base)

    return make


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_division_of_the_work_does_not_matter(variant: Callable[..., Any]) -> None:
    """One rank or several, or replicas of these, one micro-batch or many, packed or padded,
    recomputed activations or kept ones, output heads gathered or spread, weights on the device or
    in the host's memory.
    """
    settings = (
        {"packing": True},
        {"packing": False},
        {"num_ranks": 4, "replicas": 2, "reshard_after_forward": False},
        {"micro_batch_tokens": 40, "packing": False},
        {"num_ranks": 2, "micro_batch_tokens": 40, "activation_checkpointing": True},
        {"num_ranks": 2, "micro_batch_tokens": 90, "vocabulary_parallel": True},
        {"offload": True, "micro_batch_tokens": 90},
        {"num_ranks": 2, "offload": True, "checkpoint_every": 2},
    )
    folders = [variant(i, **student)[2] for i, student in enumerate(settings)]
    reference = losses(folders[0])
    assert len(reference) == 6
    assert reference[-1] < reference[0]
    weights = load_file(folders[0] / "model/model.safetensors")
    for folder in folders[1:]:
        np.testing.assert_allclose(losses(folder), reference, rtol=RTOL)
        for name, tensor in load_file(folder / "model/model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "fields",
    [
        NARROW,
        {"compute_dtype": "bfloat16", "lora": {"rank": 2}},
        {"compute_dtype": "bfloat16", "float32_residual": True, "max_grad_norm": 0.1},
    ],
    ids=["narrow", "adapters", "residual"],
)
def test_an_offloaded_student_is_the_same(
    variant: Callable[..., Any], fields: dict[str, Any]
) -> None:
    """To the last bit: where the weights are is nothing that the result goes by."""
    own = fields | {"num_ranks": 2, "micro_batch_tokens": 90}
    there, here = (variant(i, offload=i == 0, **own)[2] for i in range(2))
    assert losses(there) == losses(here)
    weights = load_file(here / "model/model.safetensors")
    for name, tensor in load_file(there / "model/model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow  # compiles for half a minute
def test_compiled_layers_train_as_they_are(variant: Callable[..., Any]) -> None:
    settings = ({}, {"compile": True, "micro_batch_tokens": 90, "activation_checkpointing": True})
    plain, compiled = (variant(i, **student)[2] for i, student in enumerate(settings))
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=RTOL)
    weights = load_file(plain / "model/model.safetensors")
    for name, tensor in load_file(compiled / "model/model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


def test_a_tied_student_on_two_ranks_is_that_on_one(
    variant: Callable[..., Any], student_folder: Path, tmp_path: Path
) -> None:
    """Its one matrix has the gradients of head and embedding, in each dtype of the computation."""
    folder = shutil.copytree(student_folder, tmp_path / "tied")
    make_llama(folder, hidden=32, layers=2, rows=416, seed=3, tied=True)
    model = {"type": "pretrained", "path": str(folder)}
    settings = ({}, {"num_ranks": 2}, {"reduce_gradients": "every_step", "num_ranks": 2})
    folders = [
        variant(number, model=model, max_steps=3, micro_batch_tokens=90, **fields)[2]
        for number, fields in enumerate(settings)
    ]
    weights = load_file(folders[0] / "model/model.safetensors")
    for other in folders[1:]:
        np.testing.assert_allclose(losses(other), losses(folders[0]), rtol=RTOL)
        for name, tensor in load_file(other / "model/model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)
    half = variant(3, model=model, max_steps=3, compute_dtype="bfloat16")[2]
    np.testing.assert_allclose(losses(half), losses(folders[0]), rtol=0.05)


def test_rotary_embeddings_that_go_by_the_longest_row_are_batched_as_if_alone(
    variant: Callable[..., Any], student_folder: Path, tmp_path: Path
) -> None:
    """Beyond the original length, a sequence has the frequencies that it has alone."""
    folder = shutil.copytree(student_folder, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
    config["max_position_embeddings"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    model = {"type": "pretrained", "path": str(folder)}
    curves = [
        losses(variant(number, model=model, max_steps=3, micro_batch_tokens=tokens)[2])
        for number, tokens in enumerate((1, 4096))
    ]
    np.testing.assert_allclose(*curves, rtol=RTOL)


def test_curve_is_that_of_a_naive_training_loop(variant: Callable[..., Any]) -> None:
    """200 steps with full logits and autograd give the same curve. Differences of single sums
    multiply, as training is a chaotic map: the last steps agree less than the first.
    """
    run, refs, folder = variant(0, max_steps=200, checkpoint_every=100, warmup_fraction=0.1)
    teacher = naive.load(run.teacher.model.path)

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        student_NV = naive.logits_of(student, row, "student")
        ce = naive.cross_entropy(student_NV, row)
        return 0.1 * ce + 0.9 * naive.forward_kl(student_NV, naive.stored_logits(teacher, row))

    table = TokenTable(Path(refs["tokens"].uri) / "train.arrow")
    expected, actual = naive.curve(run, table, example_loss), losses(folder)
    assert len(actual) == 200
    assert actual[-1] < 0.5 * actual[0]
    np.testing.assert_allclose(actual[:20], expected[:20], rtol=RTOL)
    np.testing.assert_allclose(actual, expected, rtol=0.02)


def test_experts_are_balanced_as_in_a_naive_training_loop(
    variant: Callable[..., Any], student_folder: Path, tmp_path: Path
) -> None:
    """A student with experts, whose own config weighs their balance: the loss of transformers for
    each sequence by itself, on one rank or two; and none of it where that is asked for.
    """
    folder = shutil.copytree(student_folder, tmp_path / "experts")
    sizes = {"vocab_size": 416, "max_position_embeddings": 256, "router_aux_loss_coef": 0.2}
    tiny_model("Qwen3MoeForCausalLM", folder, **sizes)
    shared = {"model": {"type": "pretrained", "path": str(folder)}, "micro_batch_tokens": 1}
    run, refs, first = variant(0, **shared)
    _, _, other = variant(1, **shared, num_ranks=2, packing=False)
    _, _, without = variant(2, **shared, router_aux_loss_coef=0)
    teacher = naive.load(run.teacher.model.path)

    def example_loss(student: PreTrainedModel, row: naive.Row) -> torch.Tensor:
        told = student(torch.tensor(row["student_ids"]).long()[None], output_router_logits=True)
        student_NV = naive.logits_of(student, row, "student")
        ce = naive.cross_entropy(student_NV, row)
        kl = naive.forward_kl(student_NV, naive.stored_logits(teacher, row))
        return 0.1 * ce + 0.9 * kl + 0.2 * len(student_NV) * told.aux_loss

    table = TokenTable(Path(refs["tokens"].uri) / "train.arrow")
    expected = naive.curve(run, table, example_loss)
    for trained in (first, other):
        np.testing.assert_allclose(losses(trained), expected, rtol=RTOL)
    assert all(2 <= r["router_balance"] < 4 for r in read_metrics(first / "metrics.jsonl"))
    assert losses(without)[0] < expected[0] - 0.3
    assert all("router_balance" not in r for r in read_metrics(without / "metrics.jsonl"))


def test_the_result_is_a_plain_hugging_face_folder(variant: Callable[..., Any]) -> None:
    run, refs, folder = variant(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert (
        tokenizer.chat_template
        == AutoTokenizer.from_pretrained(run.student.model.path).chat_template
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 plus 1?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    card = (folder / "model/README.md").read_text()
    assert "knowledge-distillation" in card
    assert refs["states"].digest in card
    # The loaded weights are the trained ones: their loss is lower than before.
    row = TokenTable(Path(refs["tokens"].uri) / "heldout.arrow")[0]
    sequence = TokenSequence(
        ids_T=row["student_ids"], supervised_T=row["student_supervised"].astype(bool)
    )
    before = AutoModelForCausalLM.from_pretrained(run.student.model.path, dtype=torch.float32)
    scores = []
    for candidate in (before, model):
        with torch.no_grad():
            logits_TV = candidate(torch.tensor(sequence.ids_T).long()[None]).logits[0]
        rows_NV = logits_TV[sequence.target_positions_N - 1]
        targets_N = torch.tensor(sequence.target_ids_N).long()
        scores.append(torch.nn.functional.cross_entropy(rows_NV, targets_N).item())
    assert scores[1] < scores[0]


@pytest.mark.parametrize("more", [{}, {"float32_residual": True}], ids=["narrow", "wide residual"])
def test_bfloat16_training_runs_and_learns(
    variant: Callable[..., Any], more: dict[str, Any]
) -> None:
    _, _, folder = variant(0, compute_dtype="bfloat16", save_dtype="bfloat16", **more)
    curve = losses(folder)
    assert curve[-1] < curve[0]
    ranks = {"num_ranks": 2, "micro_batch_tokens": 90}
    over_two = losses(variant(1, compute_dtype="bfloat16", **ranks, **more)[2])
    np.testing.assert_allclose(over_two, curve, rtol=5e-3)
    tensors = load_file(folder / "model/model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert json.loads((folder / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_narrow_weights_and_moments_train_like_wide_ones(variant: Callable[..., Any]) -> None:
    """Alone and over ranks, within what rounding at random costs; and not without steps, which
    rounded to the nearest would mostly be lost.
    """
    wide = losses(variant(0, compute_dtype="bfloat16")[2])
    for number, more in enumerate(({}, {"num_ranks": 2, "micro_batch_tokens": 90}), 1):
        run, _, folder = variant(number, **NARROW, **more)
        assert run.student.weights_dtype == "bfloat16"
        curve = losses(folder)
        np.testing.assert_allclose(curve, wide, rtol=5e-3)
        np.testing.assert_allclose(curve[0] - curve[-1], wide[0] - wide[-1], rtol=0.1)


def test_tensorboard_has_the_curves(variant: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, folder = variant(0)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    values = [event.value for event in board.Scalars("train/loss")]
    np.testing.assert_allclose(values, losses(folder), rtol=1e-6)


def test_the_best_student_of_the_curve_is_kept_and_training_ends_behind_it(
    make_recipe: Callable[..., Path],
) -> None:
    """What is exported has the scores of the curve's best point, by the evaluation; and the report
    says which it is.
    """
    recipe = str(make_recipe(num_ranks=2, lr=0.3, lr_schedule="constant", max_steps=40))
    best = {"eval.every_steps": 2, "eval.keep_best": "reverse_kl", "eval.patience": 3}
    done = run_inline(load_run(recipe, best), until="report", launched=["train"])
    folder = Path(done["student"].uri)
    curve = [p for p in read_metrics(folder / HELDOUT_FILE) if p["step"]]
    best_point = min(curve, key=lambda point: point["reverse_kl"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["info"]["kept_step"] == best_point["step"]
    assert manifest["counts"]["steps"] == best_point["step"] + 6 == curve[-1]["step"] < 40
    evaluation = json.loads((Path(done["evaluation"].uri) / "evaluation.json").read_text())
    scores = evaluation["models"]["student after"]["all"]
    assert scores["reverse_kl"] == pytest.approx(best_point["reverse_kl"], rel=1e-4)
    report = (Path(done["report"].uri) / "report.html").read_text()
    assert f"that of step {best_point['step']}, the best of the held-out curve" in report
    assert f"kept: step {best_point['step']}" in report


@pytest.mark.parametrize("more", [{"delivery": "live"}, {"algorithm": {"type": "sft"}}, {}])
def test_the_held_out_curve_changes_nothing_and_is_right(
    make_recipe: Callable[..., Path], more: dict[str, Any]
) -> None:
    """Measuring on the way leaves the weights as they are, bit for bit; and the last point is what
    the evaluation, which goes another way, finds for the exported student.
    """
    recipe = str(make_recipe(num_ranks=2))
    plain = load_run(recipe, more)
    folder = Path(run_inline(plain, until="train", launched=["train"])["student"].uri)
    run = load_run(recipe, more | {"eval.every_steps": 4})
    done = run_inline(run, until="evaluate", launched=["train"])
    measured = Path(done["student"].uri)
    weights = [(f / "model/model.safetensors").read_bytes() for f in (folder, measured)]
    assert weights[0] == weights[1]
    assert losses(measured) == losses(folder)
    assert read_metrics(folder / HELDOUT_FILE) == []
    curve = read_metrics(measured / HELDOUT_FILE)
    assert [point["step"] for point in curve] == [0, 4, 6]
    evaluation = json.loads((Path(done["evaluation"].uri) / "evaluation.json").read_text())
    for point, model in ((curve[0], "student before"), (curve[-1], "student after")):
        scores = evaluation["models"][model]["all"]
        assert point["reverse_kl"] == pytest.approx(scores["reverse_kl"], rel=1e-4)
        assert point["forward_kl"] == pytest.approx(scores["forward_kl"], rel=1e-4)
        assert point["num_tokens"] == scores["num_tokens"]
