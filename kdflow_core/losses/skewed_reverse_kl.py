"""Skewed reverse KL, KL(q || (1 - alpha) p + alpha q), of DistiLLM, arXiv 2402.03898, section 3.1.

Dimensions: T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class SkewedReverseKL:
    """KL(student || mixture), nats per token; alpha in (0, 1) is the student's part in it."""

    alpha: float = 0.1
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_m_TV = torch.logaddexp(
            log_p_TV + math.log1p(-self.alpha), log_q_TV + math.log(self.alpha)
        )
        q_TV, log_ratio_TV = log_q_TV.exp(), log_q_TV - log_m_TV
        value_T = (q_TV * log_ratio_TV).sum(-1)
        # The derivative of q (log q - log m): the mixture holds a part of q itself.
        u_TV = q_TV * (log_ratio_TV - self.alpha * log_ratio_TV.exp())
        return value_T, softmax_gradient(u_TV, q_TV)
