"""Logits of two vocabularies as logits of what both have: classes of tokens, or ranks.

The logit of a class is the logarithm of the sum of its tokens' exponentials: its softmax is the sum
of their probabilities, so a divergence of classes is that of the merged problem, and so is its
gradient, which each token has by its part of its class. The logit of a rank is that of the token
that has it.

Dimensions: B tokens of a block, V and W vocabularies of student and teacher, K classes or ranks.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class Comparison(Protocol):
    """What two vocabularies are compared by."""

    @property
    def sizes(self) -> tuple[int, int]:
        """The ids of student and teacher."""
        ...

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The student's logits of classes, [B, K]."""
        ...

    def teacher(self, logits_BW: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of classes, [B, K]."""
        ...

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The classes of some of the student's tokens, [B]."""
        ...

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """The gradient [B, V] for the student's logits, from one for its logits of classes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Both distributions in falling order, the smaller vocabulary filled up with nothing: which
    token has a rank does not count. With `total_variation` half the Wasserstein distance of
    universal logit distillation (ULD), Boizard et al., arXiv 2402.12030, equation 3.
    """

    sizes: tuple[int, int]

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._ranked(logits_BV)

    def teacher(self, logits_BW: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._ranked(logits_BW)

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The first rank: that of a token is not known here, and nothing is learned from it."""
        return torch.zeros_like(ids_B)

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """See `Comparison`."""
        del folded_BK
        order_BV = logits_BV.argsort(-1, descending=True)
        size = logits_BV.shape[-1]
        return torch.empty_like(logits_BV).scatter_(-1, order_BV, gradient_BK[:, :size])

    def _ranked(self, logits_BV: torch.Tensor) -> torch.Tensor:
        ranked_BV = logits_BV.sort(-1, descending=True).values
        lacking = max(self.sizes) - ranked_BV.shape[-1]
        # The smallest probability that there is, so that logarithms stay finite.
        floor_B1 = ranked_BV[:, :1] + math.log(torch.finfo(ranked_BV.dtype).tiny)
        return torch.cat([ranked_BV, floor_B1.expand(-1, lacking)], -1)


@dataclass(frozen=True, kw_only=True)
class Folding:
    """The class of every id of student [V] and teacher [W], int64, of `count` classes; on the
    device that the logits are on.
    """

    student_V: torch.Tensor
    teacher_W: torch.Tensor
    count: int

    @property
    def sizes(self) -> tuple[int, int]:
        """See `Comparison`."""
        return len(self.student_V), len(self.teacher_W)

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._folded(logits_BV, self.student_V)

    def teacher(self, logits_BW: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._folded(logits_BW, self.teacher_W)

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

    def _folded(self, logits_BV: torch.Tensor, class_V: torch.Tensor) -> torch.Tensor:
        largest_B1 = logits_BV.amax(-1, keepdim=True)
        sums_BK = logits_BV.new_zeros(len(logits_BV), self.count)
        mass_BV = logits_BV.sub(largest_B1).exp_()
        # Ten times as fast as `index_add_` on a CPU.
        sums_BK.scatter_add_(1, class_V.expand(len(logits_BV), -1), mass_BV)
        # A class without mass, or without tokens on this side, has the smallest number there is.
        return sums_BK.clamp_min_(torch.finfo(sums_BK.dtype).tiny).log_().add_(largest_B1)
