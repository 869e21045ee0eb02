"""One optimizer step. This is the one place that divides the loss.

Dimensions: B sequences, T tokens, N supervised tokens, K those of one teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from configs.schema.student import StudentConfig
from kdflow_core.algorithms.base import Algorithm, MicroBatch, Teacher, TokenBatch, TokenSignal
from kdflow_core.batching import (
    hidden_rows,
    rows_at,
    select_rows,
    target_rows,
    taught_tokens,
    teacher_rows,
)
from kdflow_core.contracts import (
    Example,
    Examples,
    HiddenSignal,
    SignalSource,
    TokenSequence,
)
from kdflow_core.losses.span_likelihood import Spans
from kdflow_core.models.packing import lay_out
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.optim import Optimizers
from kdflow_core.student.schedule import StepBatches
from kdflow_core.uploads import upload


@dataclass(frozen=True)
class TermTotal:
    """A term of the loss, summed over `count` tokens."""

    sum: float
    count: float

    def __add__(self, other: "TermTotal") -> "TermTotal":
        return TermTotal(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> float:
        """Its mean; 0 where nothing was counted."""
        return self.sum / max(self.count, 1)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The terms of the loss over all ranks, by the names of `metrics`; and the norm of the gradient
    before clipping. With a `fault`, loss or norm is not finite, and no step was made.
    """

    totals: dict[str, TermTotal]
    grad_norm: float
    fault: str | None = None

    @property
    def terms(self) -> dict[str, float]:
        """Their means."""
        return {name: total.mean for name, total in self.totals.items()}


def training_step(
    *,
    module: DistillationModule,
    optimizers: Optimizers,
    batches: StepBatches,
    examples: Examples,
    states: Sequence[SignalSource],
    rank: int,
    config: StudentConfig,
    device: torch.device,
) -> StepMetrics:
    """Accumulate the gradients of this rank's micro-batches, clip once, step.

    `states` are those of the algorithm's teachers, in its order. Where loss or gradient is not
    finite, the weights stay untouched.
    """
    num_ranks = len(batches.micro_batches)
    # Every supervised token of the step counts the same, whatever rank and micro-batch it is in.
    # FSDP averages gradients over the ranks, hence the factor.
    weight = num_ranks / batches.num_tokens
    totals: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    mine = batches.micro_batches[rank]
    each = config.reduce_gradients == "every_micro_batch"
    for number, indices in enumerate(mine):
        last = number == len(mine) - 1
        module.begin_micro_batch(reduces=last or each, last=last)
        stand_in = batches.micro_batches[0][0][:1]
        batch = collate(
            [examples[i] for i in indices or stand_in],
            module.algorithm,
            states,
            weight=weight,
            empty=not indices,
            device=device,
            packed=module.packed,
        )
        output = module(batch)
        output.loss.backward()
        losses.append(output.loss.detach())
        for name, values in output.terms.items():
            total = torch.stack([values.double().sum(), _count(values)])
            totals[name] = totals[name] + total if name in totals else total
    grad_norm = torch.nn.utils.clip_grad_norm_(
        module.parameters(), math.inf if config.max_grad_norm is None else config.max_grad_norm
    )
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    metrics = _over_ranks(totals, grad_norm)
    if np.isfinite([metrics.terms["loss"], metrics.grad_norm]).all():
        optimizers.step()
        module.algorithm.after_step(module.model)
    else:
        metrics = replace(metrics, fault=_fault(metrics, mine, losses))
    optimizers.zero_grad()
    return metrics


def _fault(
    metrics: StepMetrics, mine: Sequence[Sequence[int]], losses: Sequence[torch.Tensor]
) -> str:
    """What is not finite, and in which samples of this rank."""
    found = [
        int(i)
        for indices, loss in zip(mine, losses, strict=True)
        if not bool(torch.isfinite(loss))
        for i in indices
    ]
    where = (
        f"the loss of this rank's training samples {found} is not"
        if found
        else "the loss of every training sample of this rank is"
    )
    return (
        f"loss {metrics.terms['loss']} and gradient norm {metrics.grad_norm} are not both finite, "
        f"{where}"
    )


def _count(values: torch.Tensor) -> torch.Tensor:
    return torch.tensor(len(values), dtype=torch.float64, device=values.device)


def _over_ranks(totals: dict[str, torch.Tensor], grad_norm: torch.Tensor) -> StepMetrics:
    """From the sum and count of each term on this rank. The host waits for the device here, once a
    step, as whether there is a step depends on it.
    """
    sums = torch.stack(list(totals.values()))
    dist.all_reduce(sums)
    *read, norm = torch.cat([sums.flatten(), grad_norm.double().reshape(1)]).tolist()
    named = {
        name: TermTotal(*read[2 * number : 2 * number + 2]) for number, name in enumerate(totals)
    }
    return StepMetrics(totals=named, grad_norm=norm)


def collate(
    examples: Sequence[Example],
    algorithm: Algorithm,
    states: Sequence[SignalSource],
    *,
    weight: float,
    empty: bool,
    device: torch.device,
    packed: bool = False,
) -> MicroBatch:
    """Pad or pack student ids and join them with each teacher's rows of the tokens that it teaches.

    With `empty`, no token is supervised: the rank only takes part in the collectives.

    Raises AlignmentError when rows and tokens differ in number.
    """
    supervised = [] if empty else list(examples)
    targets = [np.zeros(0, np.int64), *[e.student.target_ids_N for e in supervised]]
    sampled_N, advantage_N = _of_samples(examples, supervised, device)

    def tokens(view: str) -> TokenBatch:
        return _tokens([e.views[view] for e in examples], empty, device, packed)

    return MicroBatch(
        student=tokens("student"),
        target_ids_N=upload(torch.from_numpy(np.concatenate(targets).astype(np.int64)), device),
        weight=weight,
        signals=tuple(
            _token_signal(supervised, source, teacher, device)
            for teacher, source in zip(algorithm.teachers, states, strict=True)
        ),
        teacher_tokens=tokens("teacher") if algorithm.reads_teacher_tokens else None,
        sampled_log_prob_N=sampled_N,
        advantage_N=advantage_N,
    )


def _of_samples(
    examples: Sequence[Example], supervised: Sequence[Example], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The log-probabilities of the supervised tokens, where all have been sampled or some have an
    advantage; and the advantages, where there are any. A token that was not sampled has the
    advantage 0, and its log-probability says nothing.
    """
    rewarded = any(e.advantage for e in examples)
    if not rewarded and any(e.sampled_log_prob_N is None for e in examples):
        return None, None
    sampled, advantage = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for example in supervised:
        count = len(example.student.target_ids_N)
        known_N = example.sampled_log_prob_N
        sampled.append(np.zeros(count, np.float32) if known_N is None else known_N)
        advantage.append(np.full(count, example.advantage, np.float32))
    sampled_N = upload(torch.from_numpy(np.concatenate(sampled)), device)
    advantage_N = upload(torch.from_numpy(np.concatenate(advantage)), device)
    return sampled_N, advantage_N if rewarded else None


def _tokens(
    sequences: Sequence[TokenSequence], empty: bool, device: torch.device, packed: bool
) -> TokenBatch:
    ids_BT, packed_rows = lay_out([s.ids_T for s in sequences], packed=packed)
    rows, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, sequence in enumerate([] if empty else sequences):
        target_positions_N = sequence.target_positions_N
        row, begin = (number, 0) if packed_rows is None else (0, packed_rows.edges[number])
        rows.append(np.full(len(target_positions_N), row))
        positions.append(begin + target_positions_N - 1)  # the state before a token predicts it
    is_token_BT = None
    if packed_rows is None:
        lengths_B = torch.tensor([len(s.ids_T) for s in sequences])
        is_token_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    return TokenBatch(
        ids_BT=upload(ids_BT, device),
        row_N=upload(torch.from_numpy(np.concatenate(rows)), device),
        position_N=upload(torch.from_numpy(np.concatenate(positions)), device),
        packed=packed_rows,
        is_token_BT=is_token_BT,
    )


def _token_signal(
    examples: Sequence[Example], signals: SignalSource, teacher: Teacher, device: torch.device
) -> TokenSignal:
    """What a teacher says of the examples of its data sources."""
    spans = _spans(examples, signals, teacher, device) if teacher.reads_spans else None
    if teacher.head is None:
        count = sum(len(example.student.target_positions_N) for example in examples)
        all_K = torch.arange(count, device=device)
        return TokenSignal(index_K=all_K, rest_R=all_K[:0], signal=None, spans=spans)
    nothing = np.zeros(0, np.int64)
    taught, index, rest, first = [], [nothing], [nothing], 0
    for example in examples:
        count = len(example.student.target_positions_N)
        if teacher.sources is None or example.source in teacher.sources:
            taught.append(example)
            tokens = taught_tokens(example, teacher.view)
            index.append(first + tokens)
            rest.append(first + np.setdiff1d(np.arange(count), tokens))
        first += count
    hidden_KG = select_rows(
        [teacher_rows(example, signals, teacher.view) for example in taught],
        hidden_size=signals.hidden_size,
        device=device,
    )
    return TokenSignal(
        index_K=upload(torch.from_numpy(np.concatenate(index)), device),
        rest_R=upload(torch.from_numpy(np.concatenate(rest)), device),
        signal=HiddenSignal(hidden_KG, teacher.head),
        spans=spans,
    )


def _spans(
    examples: Sequence[Example], signals: SignalSource, teacher: Teacher, device: torch.device
) -> Spans:
    """The spans of the examples, numbered through, with what the teacher says of their tokens."""
    empty = np.zeros(0, np.int64)
    rows, spans, targets, theirs = [empty], [empty], [empty], [empty]
    states, log_probs, pairs, count, first = [], [torch.zeros(0)], [np.zeros(0, bool)], 0, 0
    for example in examples:
        alignment = example.alignments[teacher.view]
        spans_S4 = alignment.spans_S4.astype(np.int64)
        own_of = dict(alignment.pairs_P2.tolist())
        pairs.append(np.array([own_of.get(a) == c for a, _, c, _ in spans_S4.tolist()], bool))
        numbers_S = count + np.arange(len(spans_S4))
        own, other = (_members(spans_S4[:, side : side + 2]) for side in (0, 2))
        rows.append(first + own.token)
        spans.append(numbers_S[own.span])
        sequence = example.views[teacher.view]
        targets.append(sequence.target_ids_N[other.token].astype(np.int64))
        theirs.append(numbers_S[other.span])
        said = signals.rows(sequence)
        if teacher.head is None:
            log_probs.append(target_rows(said).log_prob_N[torch.from_numpy(other.token)])
        else:
            states.append(rows_at(hidden_rows(said), other.token))
        first, count = first + len(example.student.target_positions_N), count + len(spans_S4)
    row_R, span_R, target_ids_M, span_M, is_pair_S = (
        upload(torch.from_numpy(np.concatenate(parts)), device)
        for parts in (rows, spans, targets, theirs, pairs)
    )
    return Spans(
        count=count,
        row_R=row_R,
        span_R=span_R,
        hidden_MG=select_rows(states, hidden_size=signals.hidden_size, device=device),
        target_ids_M=target_ids_M,
        span_M=span_M,
        is_pair_S=is_pair_S,
        log_prob_M=upload(torch.cat(log_probs), device) if teacher.head is None else None,
    )


class _Members(NamedTuple):
    """Tokens in spans, and the span of each."""

    token: np.ndarray
    span: np.ndarray


def _members(edges_S2: np.ndarray) -> _Members:
    """The tokens between the edges of spans."""
    sizes_S = edges_S2[:, 1] - edges_S2[:, 0]
    span = np.repeat(np.arange(len(edges_S2)), sizes_S)
    within = np.arange(len(span)) - np.repeat(np.cumsum(sizes_S) - sizes_S, sizes_S)
    return _Members(token=edges_S2[span, 0] + within, span=span)
