"""Training as the formulas say it: full logits, autograd, one sequence at a time.

The witness that the real training is compared with. Dimensions: B one sequence, T tokens, N
supervised tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema.run import RunConfig
from kdflow_core.batching import Division
from kdflow_core.student.schedule import BatchSchedule
from storage.tokens import TokenTable
from tests.conftest import VOCABULARY

Row = Mapping[str, Any]
ExampleLoss = Callable[[PreTrainedModel, Row], torch.Tensor]


def load(folder: str | Path) -> PreTrainedModel:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model: PreTrainedModel, row: Row, side: str) -> torch.Tensor:
    """Logits of a side's supervised tokens, [N, V]."""
    ids_BT = torch.tensor(row[f"{side}_ids"]).long()[None]
    supervised_T = torch.from_numpy(row[f"{side}_supervised"].astype(bool))[1:]
    return model(ids_BT).logits[0, :-1][supervised_T, :VOCABULARY]


@torch.no_grad()
def stored_logits(teacher: PreTrainedModel, row: Row, view: str = "teacher") -> torch.Tensor:
    """A teacher's logits from states rounded to bfloat16, as they are stored, [N, V]."""
    ids_BT = torch.tensor(row[f"{view}_ids"]).long()[None]
    supervised_T = torch.from_numpy(row[f"{view}_supervised"].astype(bool))[1:]
    states_TH = teacher.model(ids_BT).last_hidden_state[0, :-1].bfloat16().float()
    return teacher.lm_head(states_TH)[supervised_T, :VOCABULARY]


def cross_entropy(student_NV: torch.Tensor, row: Row) -> torch.Tensor:
    """Summed over the supervised tokens."""
    targets = row["student_ids"][row["student_supervised"].astype(bool)]
    return torch.nn.functional.cross_entropy(
        student_NV, torch.tensor(targets).long(), reduction="sum"
    )


def forward_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """Summed over the supervised tokens."""
    p_NV = torch.softmax(teacher_NV, -1)
    return (p_NV * (p_NV.log() - torch.log_softmax(student_NV, -1))).sum()


def curve(
    run: RunConfig,
    rows: TokenTable,
    example_loss: ExampleLoss,
    after_step: Callable[[PreTrainedModel], None] = lambda _: None,
    own: tuple[Sequence[torch.nn.Parameter], float] = ((), 0.0),
) -> list[float]:
    """The loss of each step, per supervised token; `example_loss` sums over those of a sequence.
    `own` are weights of the algorithm, and their peak learning rate.
    """
    plan = BatchSchedule(
        lengths=rows.lengths("student"),
        supervised_counts=rows.supervised_counts("student"),
        global_batch_size=run.student.global_batch_size,
        division=Division(tokens=10**9),
        num_ranks=1,
        seed=run.seed,
        epochs=None,
        max_steps=run.student.max_steps,
    )
    student = load(run.student.model.path)
    weights = [*student.parameters(), *own[0]]
    groups = [{"params": list(student.parameters()), "lr": run.student.lr}]
    groups += [{"params": list(own[0]), "lr": own[1]}] if own[0] else []
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    warmup = round((run.student.warmup_fraction or 0.03) * plan.num_steps)
    for step in range(plan.num_steps):
        progress = (step - warmup) / max(1, plan.num_steps - 1 - warmup)
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * ((step + 1) / warmup if step < warmup else factor)
        chosen = plan.sequences(step)
        total = sum(example_loss(student, rows[index]) for index in chosen)
        loss = total / int(rows.supervised_counts("student")[chosen].sum())
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(student)
    return losses
