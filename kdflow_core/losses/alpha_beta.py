"""Alpha-beta divergence of ABKD, arXiv 2505.04560, definition of section 3.

D = -1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta)]

It tends to KL(p || q) at (1, 0) and to KL(q || p) at (0, 1). Both exponents are above zero here:
below, a probability of zero gives infinity. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence, per token; the defaults are the paper's for language models."""

    alpha: float = 0.2
    beta: float = 0.7

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        a, b = self.alpha, self.beta
        mixed_TV = torch.add(d.log_p_TV * a, d.log_q_TV, alpha=b).exp_()
        q_sum_TV = (d.log_q_TV * (a + b)).exp_()
        terms_TV = (d.log_p_TV * (a + b)).exp_().mul_(a).add_(q_sum_TV, alpha=b).div_(a + b)
        value_T = d.over.sum(terms_TV.sub_(mixed_TV)) / (a * b)
        return value_T, softmax_gradient(q_sum_TV.sub_(mixed_TV).div_(a), d)
