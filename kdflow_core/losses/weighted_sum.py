"""A weighted sum of divergences over the same distributions.

Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Divergence


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """sum_i weights[i] * terms[i]; the temperature is the sum's, and that of all terms."""

    weights: tuple[float, ...]
    terms: tuple[Divergence, ...]
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        value_T = torch.zeros_like(log_q_TV[..., 0])
        gradient_TV = torch.zeros_like(log_q_TV)
        for weight, term in zip(self.weights, self.terms, strict=True):
            value, gradient = term.value_and_gradient(log_q_TV, log_p_TV)
            value_T += weight * value
            gradient_TV += weight * gradient
        return value_T, gradient_TV
