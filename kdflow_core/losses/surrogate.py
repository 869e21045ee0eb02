"""PPO's clipped surrogate of a policy gradient (arXiv 1707.06347, equation 7), by tokens.

L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with the ratio r = q(y) / b(y) of the student
q to the policy b that has sampled the token y, and the advantage A. Dimensions: T tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """`weight` times the surrogate of a reward's advantage."""

    weight: float
    clip_low: float
    clip_high: float


def clipped_surrogate(
    *,
    log_q_T: torch.Tensor,
    sampled_log_prob_T: torch.Tensor,
    advantage_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio, and dL / d log q(y): zero where the ratio is beyond the clip in the advantage's
    direction. Both [T].
    """
    ratio_T = (log_q_T - sampled_log_prob_T).exp()
    beyond_T = torch.where(advantage_T > 0, ratio_T > 1 + clip_high, ratio_T < 1 - clip_low)
    return ratio_T, torch.where(beyond_T, 0, -ratio_T * advantage_T)
