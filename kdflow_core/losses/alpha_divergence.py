"""Amari's alpha divergence, (1 - sum_v p^alpha q^(1 - alpha)) / (alpha (1 - alpha)).

Amari, Differential-Geometrical Methods in Statistics, 1985; in the parametrization of Minka, MSR
TR-2005-173, equation 7. It tends to KL(p || q) at alpha = 1 and to KL(q || p) at 0.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class AlphaDivergence(Divergence):
    """The alpha divergence, per token; alpha in (0, 1)."""

    alpha: float = 0.5

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        a = self.alpha
        mixed_TV = torch.add(d.log_p_TV * a, d.log_q_TV, alpha=1 - a).exp_()
        # 1 - sum as a sum of differences: exact where the distributions are nearly equal.
        parts_TV = torch.add(d.p_TV * a, d.q_TV, alpha=1 - a).sub_(mixed_TV)
        value_T = d.over.sum(parts_TV) / (a * (1 - a))
        return value_T, softmax_gradient(mixed_TV.div_(-a), d)
