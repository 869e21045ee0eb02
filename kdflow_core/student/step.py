"""One optimizer step. This is the one place that divides the loss.

Dimensions: B sequences, T tokens, N supervised tokens, G hidden size of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kdflow_core.batching import pad_right, select_rows, teacher_rows
from kdflow_core.contracts import Example, Examples, HiddenStateSource
from kdflow_core.errors import TrainingError
from kdflow_core.student.module import DistillationModule, MicroBatch
from kdflow_core.student.plan import StepBatches


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Means over the supervised tokens of a step, over all ranks; nats per token."""

    loss: float
    kd: float
    cross_entropy: float
    agreement: float
    grad_norm: float


def training_step(
    *,
    module: DistillationModule,
    optimizer: torch.optim.Optimizer,
    batches: StepBatches,
    examples: Examples,
    states: HiddenStateSource,
    rank: int,
    max_grad_norm: float,
    kd_ratio: float,
    device: torch.device,
) -> StepMetrics:
    """Accumulate the gradients of this rank's micro-batches, clip once, step.

    Raises TrainingError when loss or gradient is not finite; the weights are then untouched.
    """
    num_ranks = len(batches.micro_batches)
    # Every supervised token of the step counts the same, whatever rank and micro-batch it is in.
    # FSDP averages gradients over the ranks, hence the factor.
    weight = num_ranks / batches.num_tokens
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    mine = batches.micro_batches[rank]
    for number, indices in enumerate(mine):
        module.set_requires_gradient_sync(number == len(mine) - 1)  # type: ignore[operator]
        stand_in = batches.micro_batches[0][0][:1]
        batch = collate(
            [examples[i] for i in indices or stand_in],
            states,
            weight=weight,
            empty=not indices,
            device=device,
        )
        output = module(batch)
        output.loss.backward()
        terms = (output.divergence_T, output.cross_entropy_T, output.agreement_T)
        sums += torch.stack([term.double().sum() for term in terms])
    grad_norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    dist.all_reduce(sums)
    kd, cross_entropy, agreement = (sums / batches.num_tokens).tolist()
    metrics = StepMetrics(
        loss=(1 - kd_ratio) * cross_entropy + kd_ratio * kd,
        kd=kd,
        cross_entropy=cross_entropy,
        agreement=agreement,
        grad_norm=float(grad_norm),
    )
    if not np.isfinite([metrics.loss, metrics.grad_norm]).all():
        raise TrainingError(
            f"loss {metrics.loss} and gradient norm {metrics.grad_norm} are not both finite; "
            "lower student.lr, or look at the newest samples. The last checkpoint is intact"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def collate(
    examples: Sequence[Example],
    states: HiddenStateSource,
    *,
    weight: float,
    empty: bool,
    device: torch.device,
) -> MicroBatch:
    """Pad student ids and join them with the teacher's rows of the same supervised tokens.

    With `empty`, no token is supervised: the rank only takes part in the collectives.

    Raises AlignmentError when rows and tokens differ in number.
    """
    sequences = [example.student for example in examples]
    supervised = [] if empty else list(examples)
    rows, positions, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
    for row, example in enumerate(supervised):
        target_positions_N = example.student.target_positions_N
        rows.append(np.full(len(target_positions_N), row))
        positions.append(target_positions_N - 1)  # the state before a token predicts it
        targets.append(example.student.target_ids_N)
    target_ids_N = np.concatenate([np.zeros(0, np.int64), *targets]).astype(np.int64)
    return MicroBatch(
        ids_BT=pad_right([s.ids_T for s in sequences]).to(device),
        row_N=torch.from_numpy(np.concatenate(rows)).to(device),
        position_N=torch.from_numpy(np.concatenate(positions)).to(device),
        target_ids_N=torch.from_numpy(target_ids_N).to(device),
        teacher_hidden_NG=select_rows(
            [teacher_rows(example, states) for example in supervised],
            hidden_size=states.hidden_size,
            device=device,
        ),
        weight=weight,
    )
