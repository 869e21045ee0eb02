"""The training loop where a step goes wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.student import StudentConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.contracts import Example, HiddenRows, TokenSequence
from kdflow_core.errors import TrainingError
from kdflow_core.loops.trainer import Trainer
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.schedule import BatchSchedule
from tests.conftest import VOCABULARY, SilentReporter

BROKEN = 5  # the sample whose states are not finite
STEPS, SEQUENCES = 4, 2


class Records:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, record: dict[str, Any]) -> None:
        self.steps.append(record["step"])


class States:
    """Random rows, not a number for one sequence."""

    hidden_size = 48

    def __init__(self, broken: TokenSequence) -> None:
        self._broken = broken.digest

    def begin_step(self, step: int) -> None:
        """Nothing to get ready."""

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        count = len(sequence.target_positions_N)
        rows_NH = torch.randn(count, self.hidden_size, dtype=torch.bfloat16)
        if sequence.digest == self._broken:
            rows_NH[3, 7] = torch.nan
        return HiddenRows(buffer_RH=rows_NH, index_N=torch.arange(count))


def sequence(seed: int) -> TokenSequence:
    ids_T = np.random.default_rng(seed).integers(0, VOCABULARY, 20).astype(np.int32)
    return TokenSequence(ids_T=ids_T, supervised_T=np.arange(20) > 9)


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> None:
    # A test that ran a model before may have made one, which outlives it.
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def trainer_of(
    folder: Path, student: Path, teacher: Path, reporter: SilentReporter, **fields: Any
) -> Trainer:
    head = load_head(teacher, load_config(teacher), VOCABULARY)
    model = load_causal_lm(student, dtype=torch.float32, attention="sdpa")
    spec = LossSpec(divergence=ForwardKL(), kd_ratio=0.9, logits_bytes=10**6)
    ingredients = Ingredients(
        spec=spec, model=model, heads={"teacher": head}, vocabulary_size=VOCABULARY
    )
    config = {"model": {"type": "pretrained", "path": "."}, "max_steps": STEPS, "lr": 1e-3}
    return Trainer(
        module=DistillationModule(
            model=model,
            algorithm=build_algorithm(VanillaKDConfig(), ingredients),
            vocabulary_size=VOCABULARY,
        ),
        num_steps=STEPS,
        seed=0,
        config=StudentConfig.model_validate(config | fields),
        checkpoints=folder,
        reporter=reporter,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("most", [0, 1])
def test_a_step_that_is_not_finite_is_left_out_or_ends_training_by_name(
    tmp_path: Path, student_folder: Path, teacher_folder: Path, most: int
) -> None:
    sequences = [sequence(number) for number in range(STEPS * SEQUENCES)]
    examples = [Example(source="x", views={"student": one, "teacher": one}) for one in sequences]
    schedule = BatchSchedule(
        lengths=np.full(len(sequences), 20),
        supervised_counts=np.full(len(sequences), 10),
        global_batch_size=SEQUENCES,
        micro_batch_tokens=20,
        num_ranks=1,
        seed=0,
        epochs=None,
        max_steps=STEPS,
    )
    (bad,) = (step for step in range(STEPS) if BROKEN in schedule.sequences(step))
    reporter, records = SilentReporter(), Records()
    trainer = trainer_of(tmp_path, student_folder, teacher_folder, reporter, max_skipped_steps=most)
    weight = trainer.module.model.get_output_embeddings().weight

    def run(stop: int) -> None:
        trainer.run(
            stop,
            batches_of=schedule.step,
            examples=examples,  # type: ignore[arg-type] # a list does for the trainer
            states=[States(sequences[BROKEN])],
            metrics=records,
        )

    run(bad)
    before = weight.detach().clone()
    if most == 0:
        with pytest.raises(TrainingError, match=rf"step {bad + 1}: .* samples \[{BROKEN}\] is not"):
            run(STEPS)
        assert torch.equal(weight, before)
        return
    run(bad + 1)
    assert torch.equal(weight, before)
    assert any(f"step {bad + 1} is left out" in text for text in reporter.messages)
    run(STEPS)
    assert torch.isfinite(weight).all()
    if bad + 1 < STEPS:
        assert not torch.equal(weight, before)
    assert records.steps == [step for step in range(1, STEPS + 1) if step != bad + 1]


def test_gradients_are_clipped_only_where_it_is_asked_for(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """AdamW's first moments after one step are the gradients times 1 - beta."""
    one = sequence(1)
    norms = []
    for number, most in enumerate((None, 1e-3)):
        trainer = trainer_of(
            tmp_path / str(number),
            student_folder,
            teacher_folder,
            SilentReporter(),
            max_grad_norm=most,
            adam_betas=(0.5, 0.9),
        )
        torch.manual_seed(0)
        schedule = BatchSchedule(
            lengths=np.array([20]),
            supervised_counts=np.array([10]),
            global_batch_size=1,
            micro_batch_tokens=20,
            num_ranks=1,
            seed=0,
            epochs=None,
            max_steps=1,
        )
        trainer.run(
            1,
            batches_of=schedule.step,
            examples=[Example(source="x", views={"student": one, "teacher": one})],  # type: ignore[arg-type]
            states=[States(sequence(2))],
            metrics=Records(),
        )
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        norms.append(2 * float(torch.linalg.vector_norm(torch.stack([m.norm() for m in moments]))))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
