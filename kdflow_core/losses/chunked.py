"""Distillation loss from hidden states, a chunk of logits at a time, gradients included.

For each chunk of rows: the two logit products, the element-wise stage, and the two products that
carry the logit gradient to the student's states and head. The backward pass only scales what the
forward computed, so no logits are kept and nothing is recomputed.

The loss is a weighted sum, never a mean: whoever calls it divides (see student/step.py).

Dimensions: T supervised tokens, C tokens of a chunk, B tokens of a block, V vocabulary, H hidden
size of the student, G hidden size of the teacher, X the three per-token terms.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.base import Divergence

# Rows of the element-wise stage at a time: its temporaries stay in the processor's cache, and a
# chunk never takes more than its two buffers of logits.
BLOCK_ROWS = 64


class LossOutput(NamedTuple):
    """`loss` is the weighted sum in nats (differentiable); the rest is per token and detached.

    A tuple, because FSDP looks for tensors in what a module returns and knows no dataclasses.
    """

    loss: torch.Tensor
    divergence_T: torch.Tensor
    cross_entropy_T: torch.Tensor
    agreement_T: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What is computed: (1 - kd_ratio) * cross-entropy + kd_ratio * divergence."""

    divergence: Divergence
    kd_ratio: float
    chunk_tokens: int


def distillation_loss(
    *,
    student_hidden_TH: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_TG: torch.Tensor,
    teacher_head: OutputHead,
    target_ids_T: torch.Tensor,
    weights_T: torch.Tensor,
    spec: LossSpec,
) -> LossOutput:
    """sum_t weights[t] * ((1 - kd_ratio) * CE[t] + kd_ratio * D[t]), in nats.

    Cross-entropy is at temperature 1 whatever the divergence's temperature is. Logits are float32,
    or float64 when the inputs are.

    Raises:
        ValueError: rows, vocabularies or targets that do not fit together.
    """
    num_rows = student_hidden_TH.shape[0]
    rows = (teacher_hidden_TG.shape[0], target_ids_T.shape[0], weights_T.shape[0])
    if rows != (num_rows,) * 3:
        raise ValueError(
            f"{num_rows} student rows, but teacher rows, targets and weights number {rows}"
        )
    if student_head.weight_VH.shape[0] != teacher_head.weight_VH.shape[0]:
        raise ValueError(
            f"the student's head has {student_head.weight_VH.shape[0]} tokens, the teacher's "
            f"{teacher_head.weight_VH.shape[0]}"
        )
    loss, divergence_T, cross_entropy_T, agreement_T = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_TH,
        student_head.weight_VH,
        student_head.bias_V,
        student_head,
        teacher_hidden_TG,
        teacher_head,
        target_ids_T,
        weights_T,
        spec,
    )
    return LossOutput(
        loss=loss,
        divergence_T=divergence_T,
        cross_entropy_T=cross_entropy_T,
        agreement_T=agreement_T,
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        head: OutputHead,
        teacher_hidden_TG: torch.Tensor,
        teacher_head: OutputHead,
        target_ids_T: torch.Tensor,
        weights_T: torch.Tensor,
        spec: LossSpec,
    ) -> tuple[torch.Tensor, ...]:
        dtype = accumulation_dtype(hidden_TH)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        student = LogitProducer(head, dtype)
        teacher = LogitProducer(teacher_head, dtype)
        grad_hidden_TH = torch.zeros_like(hidden_TH) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if need_weight else None
        grad_bias_V = (
            torch.zeros_like(bias_V, dtype=dtype) if need_bias and bias_V is not None else None
        )
        per_token = torch.zeros(3, hidden_TH.shape[0], dtype=dtype, device=hidden_TH.device)
        for begin in range(0, hidden_TH.shape[0], spec.chunk_tokens):
            rows = slice(begin, begin + spec.chunk_tokens)
            grad_CV = student.logits(hidden_TH[rows])  # becomes the gradient, block by block
            teacher_CV = teacher.logits(teacher_hidden_TG[rows])
            for first in range(0, len(grad_CV), BLOCK_ROWS):
                block = slice(first, first + BLOCK_ROWS)
                of_chunk = slice(begin + first, min(begin + first + BLOCK_ROWS, rows.stop))
                terms_XB, grad_BV = _elementwise(
                    grad_CV[block], teacher_CV[block], target_ids_T[of_chunk], spec
                )
                per_token[:, of_chunk] = terms_XB
                grad_BV *= weights_T[of_chunk, None]
                student.through_head_(grad_BV, grad_CV[block])
                grad_CV[block] = grad_BV
            if not any((need_hidden, need_weight, need_bias)):
                continue
            if grad_hidden_TH is not None:
                grad_hidden_TH[rows] = (grad_CV @ student.weight_VH).to(grad_hidden_TH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH.addmm_(grad_CV.T, hidden_TH[rows].to(dtype))
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        ctx.save_for_backward(
            grad_hidden_TH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        divergence_T, cross_entropy_T, agreement_T = per_token
        mixed_T = (1 - spec.kd_ratio) * cross_entropy_T + spec.kd_ratio * divergence_T
        outputs = (divergence_T.clone(), cross_entropy_T.clone(), agreement_T.clone())
        ctx.mark_non_differentiable(*outputs)
        return (mixed_T @ weights_T.to(dtype), *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        grads = [g if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LogitProducer:
    """Logits of one head, chunk by chunk, in full precision.

    bfloat16 logits would put an error of tens of percent on the gradient of a small KL, so states
    and head are widened before the product.
    """

    def __init__(self, head: OutputHead, dtype: torch.dtype) -> None:
        self._head = head
        self._dtype = dtype
        self.weight_VH = head.weight_VH.detach().to(dtype)

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """softcap(scale * (h W^T + b)), [C, V]."""
        head = self._head
        logits_CV = hidden_CH.detach().to(self._dtype) @ self.weight_VH.T
        if head.bias_V is not None:
            logits_CV += head.bias_V.detach().to(self._dtype)
        if head.logit_scale != 1.0:
            logits_CV *= head.logit_scale
        if head.softcap is not None:
            logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits_CV

    def through_head_(self, grad_CV: torch.Tensor, logits_CV: torch.Tensor) -> None:
        """Turn, in place, a gradient for the logits into one for h W^T + b."""
        head = self._head
        if head.softcap is not None:
            grad_CV *= 1 - (logits_CV / head.softcap).square()  # d tanh = 1 - tanh^2
        if head.logit_scale != 1.0:
            grad_CV *= head.logit_scale


def _elementwise(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, target_ids_C: torch.Tensor, spec: LossSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence, cross-entropy and top-1 agreement [3, C], and the mixed logit gradient [C, V]."""
    divergence = spec.divergence
    temperature = divergence.temperature
    agreement_C = (student_CV.argmax(-1) == teacher_CV.argmax(-1)).to(student_CV.dtype)
    log_q_CV = torch.log_softmax(student_CV, -1)
    target_C1 = target_ids_C.long().unsqueeze(-1)
    cross_entropy_C = -log_q_CV.gather(-1, target_C1).squeeze(-1)
    tempered_q_CV = log_q_CV
    if temperature != 1.0:
        tempered_q_CV = torch.log_softmax(student_CV / temperature, -1)
    log_p_CV = torch.log_softmax(teacher_CV / temperature, -1)
    value_C, grad_CV = divergence.value_and_gradient(tempered_q_CV, log_p_CV)
    factor = temperature**2 if divergence.scale_by_temperature_squared else 1.0
    grad_CV *= spec.kd_ratio * factor / temperature
    if spec.kd_ratio < 1:
        ce_weight = 1 - spec.kd_ratio
        grad_CV += log_q_CV.exp_().mul_(ce_weight)
        grad_CV.scatter_add_(
            -1, target_C1, torch.full_like(target_C1, -ce_weight, dtype=grad_CV.dtype)
        )
    return torch.stack([value_C * factor, cross_entropy_C, agreement_C]), grad_CV
