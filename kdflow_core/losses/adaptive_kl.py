"""Adaptive KL of "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
Language Models", arXiv 2404.02657, section 4.

AKL = g_head / (g_head + g_tail) KL(p || q) + g_tail / (g_head + g_tail) KL(q || p), where the head
is the fewest of the teacher's tokens that hold a mass of `head_mass`, and g sums |p - q| over head
and tail. The weights are constants to the gradient; where p = q exactly, both are 1/2.
Dimensions: T tokens, V vocabulary, K top tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient

FIRST_TOP = 64  # tokens; mostly they hold the head, and to sort all takes 35 times as long


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Divergence):
    """Forward and reverse KL weighed by where the student is wrong, nats per token."""

    head_mass: float = 0.5

    needs_whole_vocabulary: ClassVar[bool] = True

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        forward_T1 = self._forward_weight(d.q_TV, d.p_TV)
        log_ratio_TV = d.log_q_TV - d.log_p_TV
        reverse_TV = d.q_TV * log_ratio_TV
        value_T = (-forward_T1 * d.p_TV * log_ratio_TV + (1 - forward_T1) * reverse_TV).sum(-1)
        gradient_TV = forward_T1 * (d.q_TV - d.p_TV)
        gradient_TV += (1 - forward_T1) * softmax_gradient(reverse_TV, d)
        return value_T, gradient_TV

    def _forward_weight(self, q_TV: torch.Tensor, p_TV: torch.Tensor) -> torch.Tensor:
        top_TK, order_TK, mass_TK = self._top(p_TV)
        # A token is of the head while those before it do not hold the mass yet.
        in_head_TK = mass_TK - top_TK < self.head_mass
        gap_TV = (p_TV - q_TV).abs()
        head_T1 = (gap_TV.gather(-1, order_TK) * in_head_TK).sum(-1, keepdim=True)
        total_T1 = gap_TV.sum(-1, keepdim=True)
        return torch.where(total_T1 > 0, head_T1 / total_T1.where(total_T1 > 0, 1.0), 0.5)

    def _top(self, p_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The top tokens' probabilities in falling order, their ids, and the mass through each: at
        least the head of every row.
        """
        count = FIRST_TOP
        while count < p_TV.shape[-1]:
            top_TK, order_TK = p_TV.topk(count, dim=-1)
            mass_TK = top_TK.cumsum(-1)
            if (mass_TK[:, -1] >= self.head_mass).all():
                return top_TK, order_TK, mass_TK
            count *= 8
        top_TK, order_TK = p_TV.sort(dim=-1, descending=True)
        return top_TK, order_TK, top_TK.cumsum(-1)
