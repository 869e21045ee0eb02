"""Skewed KL, KL(p || alpha p + (1 - alpha) q), of DistiLLM, arXiv 2402.03898, section 3.1.

The mixture has the teacher's mass wherever the teacher has, so value and gradient stay bounded
where the student has none. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, log_mixture, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class SkewedKL(Divergence):
    """KL(teacher || mixture), nats per token; alpha in (0, 1) is the teacher's part in it."""

    alpha: float = 0.1

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_ratio_TV = log_mixture(self.alpha, d).neg_().add_(d.log_p_TV)
        value_T = d.over.dot(d.p_TV, log_ratio_TV)
        u_TV = log_ratio_TV.add_(d.log_q_TV).exp_().mul_(self.alpha - 1)  # -(1-alpha) p q / m
        return value_T, softmax_gradient(u_TV, d)
