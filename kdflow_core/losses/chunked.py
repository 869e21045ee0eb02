"""Distillation loss from hidden states, a chunk of logits at a time, gradients included.

For each chunk of rows: the two logit products, the element-wise stage, and the two products that
carry the logit gradient to the student's states and head. The backward pass only scales what the
forward computed, so no logits are kept and nothing is recomputed.

The loss is a weighted sum, never a mean: whoever calls it divides (see student/step.py).

Dimensions: T supervised tokens, C tokens of a chunk, B tokens of a block, V vocabulary, H hidden
size of the student, G hidden size of the teacher, M per-token terms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses.elementwise import Block, LossSpec, block_terms
from kdflow_core.losses.logits import LogitProducer, accumulation_dtype, add_weight_gradient_
from kdflow_core.losses.rows import RowExchange
from kdflow_core.losses.vocabulary import ShardedVocabulary
from kdflow_core.metrics import TERM_NAMES

# Logits in the element-wise stage at a time, for each thread of a CPU, which takes whole rows: the
# temporaries stay in its cache, and a chunk never takes more than its two buffers.
BLOCK_LOGITS = 2**17


class LossOutput(NamedTuple):
    """`loss` is the weighted sum in nats (differentiable). `terms` are detached, by the names of
    `metrics`, each with one value for every token, or for whatever else an algorithm counts: the
    loss before weighing, the divergence, cross-entropy, KL(teacher || student), both entropies
    (nats), and 1 where both models have the same top-1 token.

    A tuple, because FSDP looks for tensors in what a module returns and knows no dataclasses.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the loss needs and has no gradient for."""

    head: OutputHead
    teacher: HiddenSignal | None
    target_ids_T: torch.Tensor
    weights_T: torch.Tensor
    sampled_log_prob_T: torch.Tensor | None
    advantage_T: torch.Tensor | None
    extra_ce_T: torch.Tensor | None
    log_mass_T2: torch.Tensor | None
    spec: LossSpec


def distillation_loss(
    *,
    student_hidden_TH: torch.Tensor,
    student_head: OutputHead,
    teacher: HiddenSignal | None,
    target_ids_T: torch.Tensor,
    weights_T: torch.Tensor,
    spec: LossSpec,
    sampled_log_prob_T: torch.Tensor | None = None,
    advantage_T: torch.Tensor | None = None,
    extra_ce_T: torch.Tensor | None = None,
    log_mass_T2: torch.Tensor | None = None,
) -> LossOutput:
    """sum_t weights[t] * ((1 - kd_ratio) * CE[t] + kd_ratio * f[t] * D[t]), in nats, and the policy
    gradient of the advantages.

    f is the token weight. Cross-entropy is at temperature 1 whatever the divergence's temperature
    is. `extra_ce_T` is a further weight of each token's cross-entropy in the gradient, and no part
    of the value: what a loss over several tokens makes of them. For `log_mass_T2`, [T, 2], see
    `Distributions`. Logits are float32, or float64 when the inputs are. With a vocabulary spread
    over ranks, the heads are this rank's parts, and every rank gives rows of its own: the gradient
    of its part of the head then has all ranks' rows.

    Raises:
        ValueError: rows, vocabularies or a divergence that do not fit together.
    """
    optional = (sampled_log_prob_T, advantage_T, extra_ce_T, log_mass_T2)
    per_token = [target_ids_T, weights_T, *(t for t in optional if t is not None)]
    _check(student_hidden_TH, student_head, teacher, per_token, spec)
    outputs = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_TH,
        student_head.weight_VH if student_head.parameter is None else student_head.parameter,
        student_head.bias_V,
        _Inputs(
            head=student_head,
            teacher=teacher,
            target_ids_T=target_ids_T.long(),
            weights_T=weights_T,
            sampled_log_prob_T=sampled_log_prob_T,
            advantage_T=advantage_T,
            extra_ce_T=extra_ce_T,
            log_mass_T2=log_mass_T2,
            spec=spec,
        ),
    )
    loss, *terms = outputs
    return LossOutput(loss, dict(zip(TERM_NAMES, terms, strict=True)))


def chunk_rows(spec: LossSpec, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: as many as `logits_bytes` has room for, of all models' logits.

    Ranks that share a vocabulary have chunks of the same size, by its average part.
    """
    models = 1 if spec.divergence is None else 2
    if isinstance(spec.vocabulary, ShardedVocabulary):
        ranks = dist.get_world_size(spec.vocabulary.group)
        vocabulary = math.ceil(spec.vocabulary.whole / ranks)
    return max(1, spec.logits_bytes // (models * vocabulary * dtype.itemsize))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight: torch.Tensor,
        bias_V: torch.Tensor | None,
        inputs: _Inputs,
    ) -> tuple[torch.Tensor, ...]:
        spec = inputs.spec
        dtype = accumulation_dtype(hidden_TH)
        exchange = RowExchange(len(hidden_TH), spec.vocabulary, hidden_TH.device)
        given = (hidden_TH, weight, bias_V)
        hidden_TH = exchange.gather(hidden_TH.detach())
        gradients = _Gradients(hidden_TH, given, ctx.needs_input_grad, inputs.head, dtype)
        terms_MT = _run_chunks(hidden_TH, inputs, exchange, gradients, dtype)
        if gradients.hidden_TH is not None:
            gradients.hidden_TH = exchange.scatter(gradients.hidden_TH)
        ctx.save_for_backward(*gradients.as_given(given))
        terms_MT = exchange.own(terms_MT.T).T
        outputs = tuple(terms_MT.clone())
        ctx.mark_non_differentiable(*outputs)
        return (outputs[0] @ inputs.weights_T.to(dtype), *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        grads = ctx.saved_tensors
        # Mostly the loss is what is differentiated; a copy of the head's gradient is saved then.
        if grad_loss != 1:
            grads = tuple(g if g is None else g * grad_loss.to(g.dtype) for g in grads)
        return (*grads, None)


def _run_chunks(
    hidden_TH: torch.Tensor,
    inputs: _Inputs,
    exchange: RowExchange,
    gradients: "_Gradients",
    dtype: torch.dtype,
) -> torch.Tensor:
    """The terms of all tokens [M, T]; the gradients are added up on the way."""
    spec, teacher = inputs.spec, inputs.teacher
    targets_T = exchange.gather(inputs.target_ids_T)
    weights_T = exchange.gather(inputs.weights_T).to(dtype)
    sampled_T, advantage_T = _of_samples(inputs, exchange, dtype)
    extra_T, mass_T2 = (
        None if given_T is None else exchange.gather(given_T).to(dtype)
        for given_T in (inputs.extra_ce_T, inputs.log_mass_T2)
    )
    producer = gradients.producer
    vocabulary = inputs.head.weight_VH.shape[0]
    largest = max(vocabulary, 0 if teacher is None else len(teacher.head.weight_VH))
    size = min(chunk_rows(spec, largest, dtype), len(hidden_TH))
    student_buffer_CV = hidden_TH.new_empty(size, vocabulary, dtype=dtype)
    if teacher is not None:
        teacher_hidden_TG = exchange.gather(teacher.hidden_TG)
        teacher_producer = LogitProducer(teacher.head, dtype)
        words = len(teacher.head.weight_VH)  # the student's number of tokens, or its own
        teacher_buffer_CV = student_buffer_CV.new_empty(size, words)
    terms_MT = hidden_TH.new_zeros(len(TERM_NAMES), len(hidden_TH), dtype=dtype)
    stage, block_rows = _stage(hidden_TH.device), _block_rows(hidden_TH, vocabulary, spec)
    for begin in range(0, len(hidden_TH), size or 1):
        rows = slice(begin, min(begin + size, len(hidden_TH)))
        # It becomes the gradient, block by block.
        logits_CV = producer.logits(hidden_TH[rows], student_buffer_CV[: rows.stop - begin])
        if teacher is not None:
            teacher_CV = teacher_producer.logits(
                teacher_hidden_TG[rows], teacher_buffer_CV[: rows.stop - begin]
            )
        for first in range(begin, rows.stop, block_rows):
            tokens = slice(first, min(first + block_rows, rows.stop))
            part = slice(tokens.start - begin, tokens.stop - begin)
            block = Block(
                student_BV=logits_CV[part],
                teacher_BV=None if teacher is None else teacher_CV[part],
                target_ids_B=targets_T[tokens],
                weights_B=weights_T[tokens],
                sampled_log_prob_B=None if sampled_T is None else sampled_T[tokens],
                advantage_B=None if advantage_T is None else advantage_T[tokens],
                extra_ce_B=None if extra_T is None else extra_T[tokens],
                log_mass_B2=None if mass_T2 is None else mass_T2[tokens],
            )
            terms_MT[:, tokens], grad_BV = stage(block, spec)
            producer.through_head_(grad_BV, block.student_BV)
            block.student_BV.copy_(grad_BV)
        gradients.add(rows, hidden_TH[rows], logits_CV)
    return terms_MT


def _of_samples(
    inputs: _Inputs, exchange: RowExchange, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The log-probabilities that tokens were sampled with, and their advantages, where the loss
    reads them.
    """
    spec, sampled_T, advantage_T = inputs.spec, inputs.sampled_log_prob_T, None
    reads = spec.divergence is not None and spec.divergence.needs_samples
    if spec.policy_gradient is not None:
        # Also where no token of these has an advantage: another rank's may, and all exchange them.
        zero_T = torch.zeros_like(inputs.weights_T)
        advantage_T = zero_T if inputs.advantage_T is None else inputs.advantage_T
        advantage_T = exchange.gather(advantage_T).to(dtype)
        if sampled_T is None and not reads:
            sampled_T = zero_T
    elif not reads:
        return None, None
    # Without what it reads, the divergence raises.
    return None if sampled_T is None else exchange.gather(sampled_T).to(dtype), advantage_T


class _Gradients:
    """The gradients that are asked for, in full precision."""

    def __init__(
        self,
        hidden_TH: torch.Tensor,
        given: tuple[torch.Tensor | None, ...],
        needed: tuple[bool, ...],
        head: OutputHead,
        dtype: torch.dtype,
    ) -> None:
        self.producer = LogitProducer(head, dtype)
        self.hidden_TH = torch.zeros_like(hidden_TH) if needed[0] else None
        _, weight, bias_V = given
        # Its first rows are the head's, and are written with the first chunk.
        self.weight = (
            torch.empty_like(weight, dtype=dtype) if weight is not None and needed[1] else None
        )
        self.bias_V = (
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed[2] else None
        )
        self._written = 0

    def add(self, rows: slice, hidden_CH: torch.Tensor, grad_CV: torch.Tensor) -> None:
        """Add the gradients of some rows, from the gradient of h W^T + b."""
        if self.hidden_TH is not None:
            self.hidden_TH[rows] = self.producer.hidden_gradient(grad_CV).to(hidden_CH.dtype)
        if self.weight is not None:
            weight_VH = self.weight[: grad_CV.shape[1]]
            add_weight_gradient_(weight_VH, grad_CV, hidden_CH, fresh=self._written == 0)
            self._written = len(weight_VH)
        if self.bias_V is not None:
            self.bias_V += grad_CV.sum(0)

    def as_given(self, given: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """The gradients, each in the dtype of its tensor."""
        if self.weight is not None:
            self.weight[self._written :] = 0
        grads = (self.hidden_TH, self.weight, self.bias_V)
        return tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, given, strict=True)
        )


def _block_rows(hidden_TH: torch.Tensor, vocabulary: int, spec: LossSpec) -> int:
    """Tokens in the element-wise stage at a time."""
    if hidden_TH.is_cuda or isinstance(spec.vocabulary, ShardedVocabulary):
        return max(1, len(hidden_TH))  # one kernel, or one round of reductions, for a chunk
    return max(1, BLOCK_LOGITS // vocabulary) * torch.get_num_threads()


Stage = Callable[[Block, LossSpec], tuple[torch.Tensor, torch.Tensor]]


@cache
def compiled_stage() -> Stage:
    """The element-wise stage, fused by inductor: on a GPU, Triton kernels that sweep the logits."""
    return torch.compile(block_terms, dynamic=True)


def _stage(device: torch.device) -> Stage:
    return compiled_stage() if device.type == "cuda" else block_terms


def _check(
    student_hidden_TH: torch.Tensor,
    student_head: OutputHead,
    teacher: HiddenSignal | None,
    per_token: Sequence[torch.Tensor],
    spec: LossSpec,
) -> None:
    num_rows = len(student_hidden_TH)
    rows = [len(tensor) for tensor in per_token]
    if teacher is not None:
        rows.append(len(teacher.hidden_TG))
    if set(rows) != {num_rows}:
        raise ValueError(
            f"{num_rows} student rows, but targets, weights and teacher rows number {rows}"
        )
    if (teacher is None) != (spec.divergence is None):
        raise ValueError("a divergence goes with a teacher, and none without")
    if teacher is None or spec.divergence is None:
        return
    own, other = len(student_head.weight_VH), len(teacher.head.weight_VH)
    if (own, other) != ((own, own) if spec.folding is None else spec.folding.sizes):
        raise ValueError(
            f"the student's head has {own} tokens, the teacher's {other}"
            + ("" if spec.folding is None else f"; the classes are of {spec.folding.sizes}")
        )
    sharded = isinstance(spec.vocabulary, ShardedVocabulary)
    if sharded and spec.divergence.needs_whole_vocabulary:
        raise ValueError(f"{type(spec.divergence).__name__} needs the whole vocabulary on one rank")
