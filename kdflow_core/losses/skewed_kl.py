"""Skewed KL, KL(p || alpha p + (1 - alpha) q), of DistiLLM, arXiv 2402.03898, section 3.1.

The student's probability is never alone in a denominator, so gradients stay bounded where it has
none. Dimensions: T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class SkewedKL:
    """KL(teacher || mixture), nats per token; alpha in (0, 1) is the teacher's part in it."""

    alpha: float = 0.1
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_m_TV = torch.logaddexp(
            log_p_TV + math.log(self.alpha), log_q_TV + math.log1p(-self.alpha)
        )
        value_T = (log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(-1)
        u_TV = -(1 - self.alpha) * (log_p_TV + log_q_TV - log_m_TV).exp()
        return value_T, softmax_gradient(u_TV, log_q_TV.exp())
