"""A few steps of the real training loop, in this process or in ranks of a test's own, on random
sequences and states.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.student import StudentConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.batching import Division
from kdflow_core.contracts import Example, HiddenRows, TokenSequence
from kdflow_core.loops.trainer import Trainer
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import DTYPES, load_causal_lm, load_config
from kdflow_core.student.module import DistillationModule, shard, student_mesh
from kdflow_core.student.optim import freeze_
from kdflow_core.student.schedule import BatchSchedule
from tests.conftest import VOCABULARY, SilentReporter

# All that can be kept in bfloat16.
NARROW = {
    "compute_dtype": "bfloat16",
    "weights_dtype": "bfloat16",
    "optimizer": {"type": "adamw", "moments_dtype": "bfloat16"},
}


class Records:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.written]

    def write(self, record: dict[str, Any]) -> None:
        self.written.append(record)


class States:
    """Random rows, always the same for a sequence; not a number for `broken` ones."""

    hidden_size = 48

    def __init__(self, broken: Sequence[TokenSequence] = ()) -> None:
        self._broken = {sequence.digest for sequence in broken}

    def begin_step(self, step: int) -> None:
        """Nothing to get ready."""

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        count = len(sequence.target_positions_N)
        generator = torch.Generator().manual_seed(int.from_bytes(sequence.digest[:6], "big"))
        rows_NH = torch.randn(count, self.hidden_size, generator=generator).bfloat16()
        if sequence.digest in self._broken:
            rows_NH[3, 7] = torch.nan
        return HiddenRows(buffer_RH=rows_NH, index_N=torch.arange(count))


def sequence(seed: int) -> TokenSequence:
    """20 random tokens, of which the last 10 are supervised."""
    ids_T = np.random.default_rng(seed).integers(0, VOCABULARY, 20).astype(np.int32)
    return TokenSequence(ids_T=ids_T, supervised_T=np.arange(20) > 9)


class SmallTraining:
    """`steps` steps over `per_step` sequences each, on all ranks of the process group."""

    def __init__(
        self,
        folder: Path,
        *,
        student: Path,
        teacher: Path,
        steps: int,
        per_step: int,
        broken: Sequence[int] = (),
        is_asked_to_stop: Callable[[], bool] = lambda: False,
        **fields: Any,
    ) -> None:
        sequences = [sequence(number) for number in range(steps * per_step)]
        self.examples = [
            Example(source="x", views={"student": one, "teacher": one}) for one in sequences
        ]
        self.schedule = BatchSchedule(
            lengths=np.full(len(sequences), 20),
            supervised_counts=np.full(len(sequences), 10),
            global_batch_size=per_step,
            division=Division(tokens=20),
            num_ranks=dist.get_world_size(),
            seed=0,
            epochs=None,
            max_steps=steps,
        )
        self.states = States([sequences[number] for number in broken])
        self.records, self.reporter = Records(), SilentReporter()
        head = load_head(teacher, load_config(teacher), VOCABULARY)
        given = {"model": {"type": "pretrained", "path": "."}, "max_steps": steps, "lr": 1e-3}
        given["compute_dtype"] = "float32"
        ranks = {"num_ranks": dist.get_world_size()}
        config = StudentConfig.model_validate(given | ranks | fields)
        model = load_causal_lm(student, dtype=DTYPES[config.weights_dtype], attention="sdpa")
        freeze_(model, config)
        spec = LossSpec(divergence=ForwardKL(), kd_ratio=0.9, logits_bytes=10**6)
        ingredients = Ingredients(
            spec=spec, model=model, heads={"teacher": head}, vocabulary_size=VOCABULARY
        )
        module = DistillationModule(
            model=model,
            algorithm=build_algorithm(VanillaKDConfig(), ingredients),
            vocabulary_size=VOCABULARY,
        )
        mesh = student_mesh(torch.device("cpu"), replicas=config.replicas)
        shard(
            module,
            mesh=mesh,
            compute_dtype=DTYPES[config.compute_dtype],
            offload=config.offload,
        )
        self.trainer = Trainer(
            module=module,
            num_steps=steps,
            seed=0,
            config=config,
            checkpoints=folder,
            reporter=self.reporter,
            device=torch.device("cpu"),
            is_asked_to_stop=is_asked_to_stop,
        )
        self.weight = model.get_output_embeddings().weight

    def run(self, stop: int) -> None:
        """Go on until so many steps are done."""
        self.trainer.run(
            stop,
            batches_of=self.schedule.step,
            examples=self.examples,  # type: ignore[arg-type] # a list does for the trainer
            states=[self.states],
            metrics=self.records,
        )
