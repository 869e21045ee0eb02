"""A weighted sum of divergences over the same distributions.

Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Divergence):
    """sum_i weights[i] * terms[i]; the temperature is the sum's, and that of all terms."""

    weights: tuple[float, ...]
    terms: tuple[Divergence, ...]

    @property
    def needs_whole_vocabulary(self) -> bool:  # type: ignore[override]
        """Whether a term does."""
        return any(term.needs_whole_vocabulary for term in self.terms)

    @property
    def needs_samples(self) -> bool:  # type: ignore[override]
        """Whether a term does."""
        return any(term.needs_samples for term in self.terms)

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        value_T = torch.zeros_like(d.log_q_TV[..., 0])
        gradient_TV = torch.zeros_like(d.log_q_TV)
        for weight, term in zip(self.weights, self.terms, strict=True):
            value, gradient = term.value_and_gradient(d)
            value_T += weight * value
            gradient_TV += weight * gradient
        return value_T, gradient_TV
