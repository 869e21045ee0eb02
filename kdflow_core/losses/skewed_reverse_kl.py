"""Skewed reverse KL, KL(q || (1 - alpha) p + alpha q), of DistiLLM, arXiv 2402.03898, section 3.1.

Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, log_mixture, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class SkewedReverseKL(Divergence):
    """KL(student || mixture), nats per token; alpha in (0, 1) is the student's part in it."""

    alpha: float = 0.1

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_ratio_TV = log_mixture(1 - self.alpha, d).neg_().add_(d.log_q_TV)
        value_T = d.over.dot(d.q_TV, log_ratio_TV)
        # The derivative of q (log q - log m): the mixture holds a part of q itself.
        u_TV = torch.sub(log_ratio_TV, log_ratio_TV.exp(), alpha=self.alpha).mul_(d.q_TV)
        return value_T, softmax_gradient(u_TV, d)
