"""Reverse KL by the sampled token alone, as a policy gradient with importance ratio and clipping.

The token y was sampled by an earlier student, the policy b. With the advantage
A = log p(y) - log q(y), a constant to the gradient, and the ratio r = q(y) / b(y), the surrogate is
that of PPO (`surrogate.py`). For y sampled by q itself (r = 1) the expectation of its gradient is
that of KL(q || p) over the vocabulary, at a far higher variance; "On-Policy Distillation" (Lu,
Thinking Machines Lab, 2025) trains so. The value given is r (log q(y) - log p(y)), an estimate of
that KL; it may be negative.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kdflow_core.losses.base import Distributions, Divergence
from kdflow_core.losses.surrogate import clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL(Divergence):
    """An estimate of KL(student || teacher) from one sample, nats per token."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    needs_samples: ClassVar[bool] = True

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`. Raises ValueError for tokens that were not sampled."""
        if d.sampled_log_prob_T is None:
            raise ValueError("sampled_reverse_kl needs the log-probabilities of sampled tokens")
        log_q_T = d.over.at(d.log_q_TV, d.target_ids_T)
        advantage_T = d.over.at(d.log_p_TV, d.target_ids_T) - log_q_T
        ratio_T, slope_T = clipped_surrogate(
            log_q_T=log_q_T,
            sampled_log_prob_T=d.sampled_log_prob_T,
            advantage_T=advantage_T,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        gradient_TV = d.q_TV * -slope_T.unsqueeze(-1)
        d.over.add_at_(gradient_TV, d.target_ids_T, slope_T)
        return -ratio_T * advantage_T, gradient_TV
