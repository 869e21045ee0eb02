"""Generalized Jensen-Shannon divergence of GKD, arXiv 2306.13649, section 2.

JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Divided by beta it
tends to KL(p || q) as beta goes to 0, divided by 1 - beta to KL(q || p) as beta goes to 1. As in
TRL, beta = 0 and beta = 1 *are* these two, without the factor that would make them zero.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence, log_mixture, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(Divergence):
    """JSD(beta), nats per token; beta in [0, 1]."""

    beta: float = 0.5

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        if self.beta == 0:
            return d.over.dot(d.p_TV, d.log_p_TV - d.log_q_TV), d.q_TV - d.p_TV
        if self.beta == 1:
            terms_TV = (d.log_q_TV - d.log_p_TV).mul_(d.q_TV)
            return d.over.sum(terms_TV), softmax_gradient(terms_TV, d)
        log_m_TV = log_mixture(self.beta, d)
        student_TV = (d.log_q_TV - log_m_TV).mul_(d.q_TV).mul_(1 - self.beta)
        teacher_T = d.over.dot(d.p_TV, log_m_TV.sub_(d.log_p_TV)) * -self.beta
        return teacher_T + d.over.sum(student_TV), softmax_gradient(student_TV, d)
