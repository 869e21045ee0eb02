"""The training loop where a step goes wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kdflow_core.errors import ModelError, StoppedError, TrainingError
from kdflow_core.student.checkpoint import completed_steps, step_folder
from tests.small_training import NARROW, SmallTraining

BROKEN = 5  # the sample whose states are not finite
STEPS, SEQUENCES = 4, 2


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> None:
    # A test that ran a model before may have made one, which outlives it.
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("most", [0, 1])
def test_a_step_that_is_not_finite_is_left_out_or_ends_training_by_name(
    tmp_path: Path, student_folder: Path, teacher_folder: Path, most: int
) -> None:
    training = SmallTraining(
        tmp_path,
        student=student_folder,
        teacher=teacher_folder,
        steps=STEPS,
        per_step=SEQUENCES,
        broken=[BROKEN],
        max_skipped_steps=most,
    )
    weight = training.weight
    (bad,) = (step for step in range(STEPS) if BROKEN in training.schedule.sequences(step))
    training.run(bad)
    before = weight.detach().clone()
    if most == 0:
        with pytest.raises(TrainingError, match=rf"step {bad + 1}: .* samples \[{BROKEN}\] is not"):
            training.run(STEPS)
        assert torch.equal(weight, before)
        return
    training.run(bad + 1)
    assert torch.equal(weight, before)
    assert any(f"step {bad + 1} is left out" in text for text in training.reporter.messages)
    training.run(STEPS)
    assert torch.isfinite(weight).all()
    assert training.records.steps == [s for s in range(1, STEPS + 1) if s != bad + 1]


@pytest.mark.parametrize(("minutes", "saved"), [(None, [3]), (1e-9, [1, 2, 3, 4]), (1000.0, [3])])
def test_checkpoints_go_by_steps_and_by_the_clock(
    tmp_path: Path,
    student_folder: Path,
    teacher_folder: Path,
    minutes: float | None,
    saved: list[int],
) -> None:
    training = SmallTraining(
        tmp_path,
        student=student_folder,
        teacher=teacher_folder,
        steps=5,
        per_step=1,
        checkpoint_every=3,
        checkpoint_minutes=minutes,
        keep_checkpoints=9,
    )
    training.run(5)
    training.trainer.wait()
    assert completed_steps(tmp_path) == saved


TIMES = {"seconds", "tokens_per_s", "waiting"}


def test_records_of_several_steps_are_means_and_do_not_go_across_checkpoints(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """As a run that goes on from a checkpoint has it. A step that was not made is in none."""

    def make(folder: str, **fields: Any) -> SmallTraining:
        return SmallTraining(
            tmp_path / folder,
            student=student_folder,
            teacher=teacher_folder,
            steps=9,
            per_step=1,
            broken=[BROKEN],
            max_skipped_steps=1,
            keep_checkpoints=9,
            **fields,
        )

    single, several = make("single"), make("several", log_every=3, checkpoint_every=4)
    single.run(9)
    several.run(9)
    (bad,) = {*range(1, 10)} - {*single.records.steps}
    several.trainer.wait()
    assert completed_steps(tmp_path / "several") == [4, 8]
    shutil.rmtree(step_folder(tmp_path / "several", 8))
    resumed = make("several", log_every=3, checkpoint_every=4)
    resumed.run(9)
    assert torch.equal(single.weight, resumed.weight)
    steps = {record["step"]: record for record in single.records.written}
    groups = [[1, 2, 3], [4], [5, 6], [7, 8], [9]]
    made = [kept for group in groups if (kept := [step for step in group if step != bad])]
    written = several.records.written
    assert [record["step"] for record in written] == [group[-1] for group in made]
    for record, again in zip(written[-3:], resumed.records.written[-3:], strict=True):
        assert {k: v for k, v in record.items() if k not in TIMES} == {
            k: v for k, v in again.items() if k not in TIMES
        }
    for record, group in zip(written, made, strict=True):
        members = [steps[step] for step in group]
        assert record["lr"] == members[-1]["lr"]
        for name in ("loss", "kd", "agreement", "grad_norm", "padding"):
            # Each of these steps has as many tokens.
            mean = np.mean([member[name] for member in members])
            assert record[name] == pytest.approx(mean, rel=1e-6), name


@pytest.mark.parametrize("at", [2, STEPS])
def test_a_rank_that_is_asked_to_stop_saves_and_goes_on_from_there(
    tmp_path: Path, student_folder: Path, teacher_folder: Path, at: int
) -> None:
    """In the weights of a run that nobody has stopped; after the last step, it just ends."""
    made: list[SmallTraining] = []

    def make(folder: str, asked: Callable[[], bool]) -> SmallTraining:
        made.append(
            SmallTraining(
                tmp_path / folder,
                student=student_folder,
                teacher=teacher_folder,
                steps=STEPS,
                per_step=SEQUENCES,
                is_asked_to_stop=asked,
            )
        )
        return made[-1]

    whole = make("whole", lambda: False)
    whole.run(STEPS)
    stopped = make("stopped", lambda: made[-1].trainer.step == at)
    if at < STEPS:
        with pytest.raises(StoppedError, match=f"{at} of {STEPS} steps are saved"):
            stopped.run(STEPS)
        assert completed_steps(tmp_path / "stopped") == [at]
        stopped = make("stopped", lambda: False)
        assert stopped.trainer.step == at
    stopped.run(STEPS)
    assert torch.equal(stopped.weight, whole.weight)


def test_gradients_are_clipped_only_where_it_is_asked_for(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """AdamW's first moments after one step are the gradients times 1 - beta."""
    norms = []
    for number, most in enumerate((None, 1e-3)):
        training = SmallTraining(
            tmp_path / str(number),
            student=student_folder,
            teacher=teacher_folder,
            steps=1,
            per_step=1,
            max_grad_norm=most,
            adam_betas=(0.5, 0.9),
        )
        training.run(1)
        moments = [state["exp_avg"] for state in training.trainer.optimizers.states()]
        norms.append(2 * float(torch.linalg.vector_norm(torch.stack([m.norm() for m in moments]))))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


GROUPS = [
    {"names": "model.layers.0.self_attn.*", "frozen": True},
    {"names": "model.layers.0.*", "lr": 5e-3},
    {"names": "*norm.weight", "weight_decay": 0.5},
    {"names": "lm_head.weight", "frozen": True},
]


def test_groups_of_parameters_train_as_they_are_told(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """AdamW's first step is as large as its learning rate, whatever the gradient; weight decay adds
    its part.
    """
    training = SmallTraining(
        tmp_path,
        student=student_folder,
        teacher=teacher_folder,
        steps=1,
        per_step=2,
        warmup_fraction=0.0,
        lr_schedule="constant",
        weight_decay=0.1,
        parameter_groups=GROUPS,
    )
    named = dict(training.trainer.module.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    training.run(1)
    for name, parameter in named.items():
        if "layers.0.self_attn" in name or name == "lm_head.weight":
            assert torch.equal(parameter, before[name]), name
            continue
        lr = 5e-3 if "layers.0." in name else 1e-3
        # The layer norms of layer 0 are in its group, which came first.
        decay = 0.5 if "norm" in name and lr == 1e-3 else 0.1 if parameter.ndim > 1 else 0.0
        moved = parameter.detach() - before[name] * (1 - lr * decay)
        assert moved.abs().max().item() == pytest.approx(lr, rel=0.02), name


def test_muon_makes_the_gradient_of_inner_matrices_orthogonal(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """Its step is U V^T of the gradient U S V^T, roughly, times 0.2 sqrt(longer side) of the
    learning rate (2502.16982, equation 4); the rest is AdamW's, to the last bit.
    """
    moved, gradients = {}, {}
    for kind in ("adamw", "muon"):
        training = SmallTraining(
            tmp_path / kind,
            student=student_folder,
            teacher=teacher_folder,
            steps=1,
            per_step=4,
            warmup_fraction=0.0,
            lr_schedule="constant",
            optimizer={"type": kind},
            adam_betas=(0.0, 0.9),
            max_grad_norm=None,
        )
        named = dict(training.trainer.module.model.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        training.run(1)
        moved[kind] = {name: p.detach() - before[name] for name, p in named.items()}
        if kind == "adamw":
            (part,) = training.trainer.optimizers.parts
            gradients = {name: part.state[p]["exp_avg"] for name, p in named.items()}
    inner = {name for name, g in gradients.items() if ".layers." in name and g.ndim == 2}
    assert len(inner) > 6
    for name, gradient in gradients.items():
        if name not in inner:
            assert torch.equal(moved["muon"][name], moved["adamw"][name]), name
            continue
        left, sizes, right = torch.linalg.svd(gradient.double(), full_matrices=False)
        step = -moved["muon"][name].double() / (1e-3 * 0.2 * max(gradient.shape) ** 0.5)
        along = (left.T @ step @ right.T).diagonal()[sizes > 0.1 * sizes[0]]
        assert len(along) > 2, name
        assert along.min() > 0.6, name
        assert along.max() < 1.3, name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": {"type": "muon"}},
        NARROW,
        NARROW | {"optimizer": {"type": "adamw"}},
        {"optimizer": {"type": "adamw", "moments_dtype": "bfloat16"}},
        {"optimizer": {"type": "adamw", "moments_dtype": "float8"}},
        NARROW | {"optimizer": {"type": "adamw", "moments_dtype": "float8"}},
    ],
    ids=["adamw", "muon", "narrow", "wide moments", "narrow moments", "float8", "narrow float8"],
)
def test_groups_of_parameters_are_those_of_a_checkpoint(
    tmp_path: Path, student_folder: Path, teacher_folder: Path, fields: dict[str, Any]
) -> None:
    weights, kept = [], []
    for number, stops in enumerate(([4], [2, 4])):
        for stop in stops:
            training = SmallTraining(
                tmp_path / str(number),
                student=student_folder,
                teacher=teacher_folder,
                steps=4,
                per_step=2,
                parameter_groups=GROUPS,
                **fields,
            )
            training.run(stop)
            training.trainer.save()
            training.trainer.wait()
        weights.append(dict(training.trainer.module.model.named_parameters()))
        states = training.trainer.optimizers.states()
        kept.append([{name: value.dtype for name, value in state.items()} for state in states])
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name]), name
    assert kept[0] == kept[1]


def test_a_student_that_is_all_frozen_is_refused(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    with pytest.raises(ModelError, match="every parameter is frozen"):
        SmallTraining(
            tmp_path,
            student=student_folder,
            teacher=teacher_folder,
            steps=1,
            per_step=1,
            parameter_groups=[{"names": "*", "frozen": True}],
        )
