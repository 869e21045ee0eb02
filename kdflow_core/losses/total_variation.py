"""Total variation, 1/2 sum_v |p - q|: in [0, 1], no logarithm.

One of the f-divergences of f-distill, arXiv 2307.15190, section 3.2. Where p = q its subgradient is
taken as 0. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """Half the L1 distance, per token."""

    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        q_TV = log_q_TV.exp()
        excess_TV = q_TV - log_p_TV.exp()
        return 0.5 * excess_TV.abs().sum(-1), softmax_gradient(0.5 * q_TV * excess_TV.sign(), q_TV)
