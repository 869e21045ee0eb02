"""Dual-space distillation: teacher and student compared in each other's space of states.

DSKD, Zhang et al., arXiv 2406.17328, section 3; with tokens aligned exactly as in its second
version, arXiv 2504.11426. One projector takes the teacher's states to the student's head, where the
student learns from the distribution that comes out; it learns to predict the data's tokens there.
Another takes the student's states to the teacher's head, where they are compared with the teacher's
own. So both comparisons are over one vocabulary, whatever the tokenizers are. Of N supervised
tokens, K of them compared,

    loss = (1 - r) sum_N CE(q) + r sum_K (D(p', q) + CE(p') + D(p, q')),

r `kd_ratio`, p' the teacher at the student's head (constant in D, the head constant in CE), and q'
the student at the teacher's.

Dimensions: N supervised tokens, K those that are compared; H and G hidden sizes of student and
teacher; V and W their vocabularies; O tokens that both have.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema.algorithm import DualSpaceConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    Teacher,
    taught_loss,
    whole_batch_loss,
)
from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.metrics import PROJECTED_TERM, TEACHER_SPACE_TERM

AT_ONCE = 8192  # rows of a head, in float64


class DualSpace(Algorithm):
    """One teacher, at all tokens that it says something about; others have cross-entropy alone."""

    def __init__(self, config: DualSpaceConfig, ingredients: Ingredients) -> None:
        super().__init__()
        spec = ingredients.spec
        # Both comparisons are of one vocabulary: nothing is folded.
        self._spec = replace(spec, folding=None)
        self._in_teacher = replace(self._spec, kd_ratio=1.0, policy_gradient=None)
        self._alone = replace(self._in_teacher, divergence=None, kd_ratio=0.0, token_weight=None)
        self._teacher = Teacher(head=ingredients.heads["teacher"])
        self._rate = config.projector_lr
        assert ingredients.first_head is not None
        own_OH, other_OG = _shared_rows(
            ingredients.first_head(), self._teacher.states_head, ingredients.shared_O2()
        )
        self.to_student_GH = torch.nn.Parameter(projector(other_OG, own_OH))
        self.to_teacher_HG = torch.nn.Parameter(projector(own_OH, other_OG))

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return (self._teacher,)

    @property
    def lr(self) -> float | None:
        """See `Algorithm`."""
        return self._rate

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        (taught,) = batch.signals
        signal, index_K, ratio = taught.signal, taught.index_K, self._spec.kd_ratio
        assert isinstance(signal, HiddenSignal)
        head = constant(student.head)
        projected_KH = signal.hidden_TG.to(self.to_student_GH.dtype) @ self.to_student_GH
        in_student = HiddenSignal(projected_KH.detach(), head)
        output = taught_loss(
            student, batch, taught=replace(taught, signal=in_student), spec=self._spec
        )
        compared = batch.at(index_K)
        told = whole_batch_loss(
            Student(model=student.model, hidden_NH=projected_KH, head=head),
            replace(compared, weight=batch.weight * ratio),
            teacher=None,
            spec=self._alone,
        )
        moved_KG = student.hidden_NH[index_K].to(self.to_teacher_HG.dtype) @ self.to_teacher_HG
        in_teacher = distillation_loss(
            student_hidden_TH=moved_KG,
            student_head=signal.head,
            teacher=signal,
            target_ids_T=torch.zeros_like(compared.target_ids_N),  # not read
            weights_T=compared.weights_N * ratio,
            spec=self._in_teacher,
        )
        total = ratio * (told.terms["loss"].sum() + in_teacher.terms["loss"].sum())
        terms = output.terms | {
            PROJECTED_TERM.name: told.terms["cross_entropy"],
            TEACHER_SPACE_TERM.name: in_teacher.terms["kd"],
        }
        terms["loss"] = terms["loss"] + total / max(1, len(terms["loss"]))
        return LossOutput(output.loss + told.loss + in_teacher.loss, terms)


def constant(head: OutputHead) -> OutputHead:
    """A head as it is, without a gradient."""
    return replace(
        head,
        weight_VH=head.weight_VH.detach(),
        parameter=None,
        bias_V=None if head.bias_V is None else head.bias_V.detach(),
    )


def projector(source_OH: torch.Tensor, target_OG: torch.Tensor) -> torch.Tensor:
    """The matrix P [H, G] that keeps logits best, in float32: of all h, the least squares of
    h W^T = (h P) W'^T for the rows W and W' of two heads for the same tokens (arXiv 2504.11426,
    section 3).
    """
    # By the normal equations, which are of the states' size whatever the vocabulary's is.
    both_HG = source_OH.new_zeros(source_OH.shape[1], target_OG.shape[1], dtype=torch.float64)
    gram_GG = target_OG.new_zeros(target_OG.shape[1], target_OG.shape[1], dtype=torch.float64)
    for begin in range(0, len(source_OH), AT_ONCE):
        rows = slice(begin, begin + AT_ONCE)
        wide_OG = target_OG[rows].double()
        both_HG += source_OH[rows].double().T @ wide_OG
        gram_GG += wide_OG.T @ wide_OG
    projector_HG: torch.Tensor = both_HG @ torch.linalg.pinv(gram_GG, hermitian=True)
    return projector_HG.float()


def _shared_rows(
    student: OutputHead, teacher: OutputHead, shared_O2: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of both heads for the tokens that both have (None: for all), scaled as their logits
    are; on the CPU, as the student is before it is sharded.
    """
    own_VH, other_WG = student.weight_VH.cpu(), teacher.weight_VH.cpu()
    if shared_O2 is not None:
        own_VH, other_WG = own_VH[shared_O2[:, 0]], other_WG[shared_O2[:, 1]]
    return own_VH * student.logit_scale, other_WG * teacher.logit_scale
