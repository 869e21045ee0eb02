"""Logits of two vocabularies as logits of the classes that both are folded onto.

The logit of a class is the logarithm of the sum of its tokens' exponentials: its softmax is the sum
of their probabilities, so a divergence of classes is that of the merged problem, and so is its
gradient, which each token has by its part of its class.

Dimensions: B tokens of a block, V vocabulary of one side, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class _Side(NamedTuple):
    """The class of every id; the ids by class, and where each class begins among them."""

    class_V: torch.Tensor
    ids_V: torch.Tensor
    begin_K: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Folding:
    """Both vocabularies, folded; on the device that the logits are on."""

    student_side: _Side
    teacher_side: _Side

    @property
    def sizes(self) -> tuple[int, int]:
        """The ids of student and teacher."""
        return len(self.student_side.class_V), len(self.teacher_side.class_V)

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The student's logits of classes, [B, K]."""
        return _folded(logits_BV, self.student_side)

    def teacher(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of classes, [B, K]."""
        return _folded(logits_BV, self.teacher_side)

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The classes of some of the student's tokens, [B]."""
        return self.student_side.class_V[ids_B]

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """The gradient [B, V] for the student's logits, from one for its logits of classes."""
        class_V = self.student_side.class_V
        part_BV = logits_BV.sub(folded_BK.index_select(1, class_V)).exp_()
        return part_BV.mul_(gradient_BK.index_select(1, class_V))


def build_folding(
    student_V: torch.Tensor, teacher_V: torch.Tensor, count: int, device: torch.device
) -> Folding:
    """The folding onto `count` classes, from the class of every id of both sides (int64)."""
    return Folding(
        student_side=_side(student_V.to(device), count),
        teacher_side=_side(teacher_V.to(device), count),
    )


def _side(class_V: torch.Tensor, count: int) -> _Side:
    sizes_K = torch.bincount(class_V, minlength=count)
    return _Side(
        class_V=class_V,
        ids_V=torch.argsort(class_V, stable=True),
        begin_K=sizes_K.cumsum(0) - sizes_K,
    )


def _folded(logits_BV: torch.Tensor, side: _Side) -> torch.Tensor:
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    mass_VB = logits_BV.sub(largest_B1).exp_().T.contiguous()
    # Sums of runs of rows: of all ways to add up columns by class, the fastest by far.
    sums_KB = F.embedding_bag(side.ids_V, mass_VB, side.begin_K, mode="sum")
    # A class without mass, or without tokens on this side, has the smallest number there is.
    sums_BK = sums_KB.T.clamp_min(torch.finfo(sums_KB.dtype).tiny)
    return sums_BK.log_().add_(largest_B1)
