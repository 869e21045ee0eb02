"""Amari's alpha divergence, (1 - sum_v p^alpha q^(1 - alpha)) / (alpha (1 - alpha)).

Amari, Differential-Geometrical Methods in Statistics, 1985; in the parametrization of Minka, MSR
TR-2005-173, equation 7. It tends to KL(p || q) at alpha = 1 and to KL(q || p) at 0.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class AlphaDivergence:
    """The alpha divergence, per token; alpha in (0, 1)."""

    alpha: float = 0.5
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        q_TV = log_q_TV.exp()
        mixed_TV = (self.alpha * log_p_TV + (1 - self.alpha) * log_q_TV).exp()
        # 1 - sum as a sum of differences: exact where the distributions are nearly equal.
        parts_TV = self.alpha * log_p_TV.exp() + (1 - self.alpha) * q_TV - mixed_TV
        value_T = parts_TV.sum(-1) / (self.alpha * (1 - self.alpha))
        return value_T, softmax_gradient(-mixed_TV / self.alpha, q_TV)
