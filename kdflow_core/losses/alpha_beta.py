"""Alpha-beta divergence of ABKD, arXiv 2505.04560, definition of section 3.

D = -1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta)]

It tends to KL(p || q) at (1, 0) and to KL(q || p) at (0, 1). Both exponents are above zero here:
below, a probability of zero gives infinity. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """The alpha-beta divergence, per token; the defaults are the paper's for language models."""

    alpha: float = 0.2
    beta: float = 0.7
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        a, b = self.alpha, self.beta
        mixed_TV = (a * log_p_TV + b * log_q_TV).exp()
        p_sum_TV, q_sum_TV = ((a + b) * log_p_TV).exp(), ((a + b) * log_q_TV).exp()
        terms_TV = mixed_TV - (a * p_sum_TV + b * q_sum_TV) / (a + b)
        value_T = -terms_TV.sum(-1) / (a * b)
        return value_T, softmax_gradient((q_sum_TV - mixed_TV) / a, log_q_TV.exp())
