"""Logits of two vocabularies as logits of what both have: classes of tokens, or ranks.

The logit of a class is the logarithm of the sum of its tokens' exponentials: its softmax is the sum
of their probabilities, so a divergence of classes is that of the merged problem, and so is its
gradient, which each token has by its part of its class. The logit of a rank is that of the token
that has it.

Dimensions: B tokens of a block, V and W vocabularies of student and teacher, K classes or ranks, O
matched tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Comparison(ABC):
    """What two vocabularies are compared by: what becomes of every id of student [V] and teacher
    [W], int64, on the device that the logits are on.
    """

    student_V: torch.Tensor
    teacher_W: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """The ids of student and teacher."""
        return len(self.student_V), len(self.teacher_W)

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The student's logits of classes, [B, K]."""
        return self._compared(logits_BV, self.student_V)

    def teacher(self, logits_BW: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of classes, [B, K]."""
        return self._compared(logits_BW, self.teacher_W)

    @abstractmethod
    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The classes of some of the student's tokens, [B]."""

    @abstractmethod
    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """The gradient [B, V] for the student's logits, from one for its logits of classes."""

    @abstractmethod
    def _compared(self, logits_BV: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
        """A side's logits of classes, [B, K], from what becomes of its ids."""


@dataclass(frozen=True, kw_only=True)
class Ranks(Comparison):
    """Tokens that are matched side by side, then the others of either side in falling order, the
    smaller side filled up with nothing: which of them has a rank does not count. Of all ids of a
    side, the first `matched` are the matched ones. With none of these, and `total_variation`, half
    the Wasserstein distance of universal logit distillation (ULD), Boizard et al., arXiv
    2402.12030, equation 3.
    """

    matched: int

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The first column: that of a token is not known here, and nothing is learned from it."""
        return torch.zeros_like(ids_B)

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """See `Comparison`."""
        del folded_BK
        others = self.student_V[self.matched :]
        order_BV = logits_BV[:, others].argsort(-1, descending=True)
        columns = len(self.student_V)
        unfolded_BV = torch.empty_like(logits_BV)
        unfolded_BV[:, self.student_V[: self.matched]] = gradient_BK[:, : self.matched]
        return unfolded_BV.scatter_(-1, others[order_BV], gradient_BK[:, self.matched : columns])

    def _compared(self, logits_BV: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
        own_BV = logits_BV[:, ids_V]
        ranked_BV = own_BV[:, self.matched :].sort(-1, descending=True).values
        lacking = max(self.sizes) - len(ids_V)
        # The smallest probability that there is, so that logarithms stay finite.
        floor_B1 = own_BV.amax(-1, keepdim=True) + math.log(torch.finfo(own_BV.dtype).tiny)
        return torch.cat([own_BV[:, : self.matched], ranked_BV, floor_B1.expand(-1, lacking)], -1)


def ranks(sizes: tuple[int, int], matched_O2: torch.Tensor | None, device: torch.device) -> Ranks:
    """Two vocabularies of these `sizes` by their ranks but for tokens that are matched: their ids
    in both, [O, 2]; None: those of one id, of one vocabulary.
    """
    if matched_O2 is None:
        matched_O2 = torch.arange(sizes[0])[:, None].expand(-1, 2)
    sides = []
    for size, matched_O in zip(sizes, matched_O2.unbind(1), strict=True):
        is_other_V = torch.ones(size, dtype=torch.bool)
        is_other_V[matched_O] = False
        sides.append(torch.cat([matched_O, is_other_V.nonzero().squeeze(-1)]).to(device))
    return Ranks(student_V=sides[0], teacher_W=sides[1], matched=len(matched_O2))


@dataclass(frozen=True, kw_only=True)
class Folding(Comparison):
    """Every id has a class, of `count` classes."""

    count: int

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self.student_V[ids_B]

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """See `Comparison`."""
        class_BV = self.student_V.expand(len(logits_BV), -1)
        part_BV = logits_BV.sub(folded_BK.gather(1, class_BV)).exp_()
        return part_BV.mul_(gradient_BK.gather(1, class_BV))

    def _compared(self, logits_BV: torch.Tensor, class_V: torch.Tensor) -> torch.Tensor:
        largest_B1 = logits_BV.amax(-1, keepdim=True)
        sums_BK = logits_BV.new_zeros(len(logits_BV), self.count)
        mass_BV = logits_BV.sub(largest_B1).exp_()
        # Ten times as fast as `index_add_` on a CPU.
        sums_BK.scatter_add_(1, class_V.expand(len(logits_BV), -1), mass_BV)
        # A class without mass, or without tokens on this side, has the smallest number there is.
        return sums_BK.clamp_min_(torch.finfo(sums_BK.dtype).tiny).log_().add_(largest_B1)
