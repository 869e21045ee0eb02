"""Generalized Jensen-Shannon divergence of GKD, arXiv 2306.13649, section 2.

JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Divided by beta it
tends to KL(p || q) as beta goes to 0, divided by 1 - beta to KL(q || p) as beta goes to 1. As in
TRL, beta = 0 and beta = 1 *are* these two, without the factor that would make them zero.
Dimensions: T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from kdflow_core.losses.base import softmax_gradient


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD:
    """JSD(beta), nats per token; beta in [0, 1]."""

    beta: float = 0.5
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        q_TV, p_TV = log_q_TV.exp(), log_p_TV.exp()
        if self.beta == 0:
            return (p_TV * (log_p_TV - log_q_TV)).sum(-1), q_TV - p_TV
        if self.beta == 1:
            terms_TV = q_TV * (log_q_TV - log_p_TV)
            return terms_TV.sum(-1), softmax_gradient(terms_TV, q_TV)
        log_m_TV = torch.logaddexp(
            log_p_TV + math.log(self.beta), log_q_TV + math.log1p(-self.beta)
        )
        student_TV = (1 - self.beta) * q_TV * (log_q_TV - log_m_TV)
        value_T = (self.beta * p_TV * (log_p_TV - log_m_TV) + student_TV).sum(-1)
        return value_T, softmax_gradient(student_TV, q_TV)
