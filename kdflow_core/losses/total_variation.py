"""Total variation, 1/2 sum_v |p - q|: in [0, 1], no logarithm.

One of the f-divergences of f-distill, arXiv 2307.15190, section 3.2. Where p = q its subgradient is
taken as 0. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """Half the L1 distance, per token."""

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        excess_TV = d.q_TV - d.p_TV
        u_TV = excess_TV.sign().mul_(d.q_TV).mul_(0.5)
        return 0.5 * d.over.sum(excess_TV.abs_()), softmax_gradient(u_TV, d)
