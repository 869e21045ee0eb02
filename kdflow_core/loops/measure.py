"""What the student in training is measured by, without learning from it.

Dimensions: N supervised tokens of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from configs.schema.algorithm import VanillaKDConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    whole_batch_loss,
)
from kdflow_core.algorithms.vanilla_kd import VanillaKD
from kdflow_core.batching import Division
from kdflow_core.contracts import Example, OutputHead, SignalSource
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.step import collate


@dataclass(frozen=True, kw_only=True)
class HeldoutScores:
    """Means over the supervised tokens of held-out sequences; nats per token."""

    reverse_kl: float
    forward_kl: float
    cross_entropy: float
    agreement: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class LogProbDifference:
    """How far the student's log-probabilities of sampled tokens are from those that the engine
    reported: mean and largest absolute difference, in nats, over `num_tokens` tokens.
    """

    mean: float
    largest: float
    num_tokens: int


class TemperedCrossEntropy(Algorithm):
    """Cross-entropy at a temperature: minus the log-probability that a token is sampled with."""

    def __init__(self, spec: LossSpec, temperature: float) -> None:
        super().__init__()
        self._spec = replace(
            spec, divergence=None, kd_ratio=0.0, token_weight=None, policy_gradient=None
        )
        self._temperature = temperature

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`. The cap is on the logits before the temperature divides them."""
        head = student.head
        cap = None if head.softcap is None else head.softcap / self._temperature
        tempered = replace(head, logit_scale=head.logit_scale / self._temperature, softcap=cap)
        return whole_batch_loss(
            replace(student, head=tempered), batch, teacher=None, spec=self._spec
        )


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """The student, and how large its batches are. Every rank calls the functions below, with the
    same examples, and takes its share of them.
    """

    module: DistillationModule
    division: Division
    device: torch.device


class HeldoutCurve:
    """The held-out scores of a student in training, as often as they are asked for, by the reverse
    KL to a teacher with `head` whose `states` are at hand.
    """

    def __init__(
        self,
        measuring: Measuring,
        *,
        spec: LossSpec,
        head: OutputHead,
        states: SignalSource,
        examples: Sequence[Example],
    ) -> None:
        self._measuring, self._states, self._examples = measuring, states, examples
        module = measuring.module
        ingredients = Ingredients(
            spec=replace(
                spec,
                divergence=ReverseKL(),
                kd_ratio=1.0,
                token_weight=None,
                policy_gradient=None,
                span_share=0.0,
                within_classes=False,
            ),
            model=module.model,
            heads={"teacher": module.part_of_head(head)},
            vocabulary_size=module.vocabulary_size,
        )
        self._judge = VanillaKD(VanillaKDConfig(), ingredients)

    def scores(self) -> HeldoutScores:
        """Measure the student as it is now. Collective."""
        return heldout_scores(self._measuring, self._judge, self._examples, self._states)


def heldout_scores(
    measuring: Measuring,
    algorithm: Algorithm,
    examples: Sequence[Example],
    states: SignalSource,
) -> HeldoutScores:
    """The scores of held-out examples, by an algorithm whose one divergence is the reverse KL."""
    names = ("kd", "forward_kl", "cross_entropy", "agreement")
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=measuring.device)
    for _, output in _outputs(measuring, algorithm, examples, [states]):
        for column, name in enumerate(names):
            term = output.terms[name]
            sums[0, column] += term.double().sum()
            sums[1, column] += len(term)
    dist.all_reduce(sums)
    # Each by its own count: where tokens are aligned, a teacher says nothing about some.
    reverse_kl, forward_kl, cross_entropy, agreement = (sums[0] / sums[1].clamp_min(1)).tolist()
    return HeldoutScores(
        reverse_kl=reverse_kl,
        forward_kl=forward_kl,
        cross_entropy=cross_entropy,
        agreement=agreement,
        num_tokens=int(sums[1, names.index("cross_entropy")]),
    )


def log_prob_difference(
    measuring: Measuring, spec: LossSpec, temperature: float, examples: Sequence[Example]
) -> LogProbDifference:
    """Compare log-probabilities of examples that were sampled at a temperature."""
    algorithm = TemperedCrossEntropy(spec, temperature)
    total, largest, count = 0.0, 0.0, 0
    for batch, output in _outputs(measuring, algorithm, examples, []):
        sampled = [e.sampled_log_prob_N for e in batch if e.sampled_log_prob_N is not None]
        difference_N = np.abs(np.concatenate(sampled) + output.terms["cross_entropy"].cpu().numpy())
        total += float(difference_N.sum(dtype=np.float64))
        largest = max(largest, float(difference_N.max()))
        count += len(difference_N)
    sums = torch.tensor([total, count], dtype=torch.float64, device=measuring.device)
    top = torch.tensor(largest, dtype=torch.float64, device=measuring.device)
    dist.all_reduce(sums)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return LogProbDifference(
        mean=float(sums[0] / sums[1]), largest=float(top), num_tokens=int(sums[1])
    )


@torch.no_grad()
def _outputs(
    measuring: Measuring,
    algorithm: Algorithm,
    examples: Sequence[Example],
    states: Sequence[SignalSource],
) -> Iterator[tuple[list[Example], LossOutput]]:
    """This rank's batches, with their terms. All ranks run the module equally often."""
    module, rank, size = measuring.module, dist.get_rank(), dist.get_world_size()
    training = module.training
    module.eval()
    lengths_N = np.array([len(e.student.ids_T) for e in examples], np.int64)
    batches = measuring.division.batches(lengths_N)
    for first in range(0, len(batches), size):
        mine = batches[first + rank] if first + rank < len(batches) else []
        chosen = [examples[i] for i in mine]
        batch = collate(
            chosen or examples[:1],
            algorithm,
            states,
            weight=1.0,
            empty=not chosen,
            device=measuring.device,
            packed=module.packed,
        )
        output = module(batch, algorithm=algorithm)
        if chosen:
            yield chosen, output
    module.release()
    module.train(training)
