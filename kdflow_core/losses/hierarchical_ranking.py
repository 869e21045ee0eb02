"""Hierarchical ranking: the teacher's order of its top tokens, as hinges on the student's
probabilities.

With P the teacher's and Q the student's `top_k` tokens, and v* the teacher's first:

L = sum_{j in P} max(0, q_j - q_v*) + sum_{i in P} sum_{j in Q} [p_i > p_j] max(0, q_j - q_i)

First the teacher's choice before its other top tokens, then these before what the student prefers
and the teacher does not. The ranking loss `hrl` of KDFlow (arXiv 2603.01875), where the comparison
of [p_i > p_j] takes the student's probabilities and the temperature is ignored; here they are the
teacher's, and it is not. Zero where the orders agree; in units of probability, not nats.
Dimensions: T tokens, V vocabulary, K top tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient


@dataclass(frozen=True, kw_only=True)
class HierarchicalRanking(Divergence):
    """Hinges on pairs of top tokens that the student has in the wrong order; per token."""

    top_k: int = 5

    needs_whole_vocabulary: ClassVar[bool] = True

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        k = min(self.top_k, d.q_TV.shape[-1])
        p_first_TK, first_TK = d.p_TV.topk(k, dim=-1)
        q_second_TK, second_TK = d.q_TV.topk(k, dim=-1)
        q_first_TK, p_second_TK = d.q_TV.gather(-1, first_TK), d.p_TV.gather(-1, second_TK)
        choice_TK = (q_first_TK - q_first_TK[:, :1]).clamp_(min=0)
        pairs_TKK = (q_second_TK.unsqueeze(-2) - q_first_TK.unsqueeze(-1)).clamp_(min=0)
        pairs_TKK *= p_first_TK.unsqueeze(-1) > p_second_TK.unsqueeze(-2)
        # How often each probability counts in the active hinges, and with which sign.
        wrong_TK, active_TKK = (choice_TK > 0).to(d.q_TV), (pairs_TKK > 0).to(d.q_TV)
        first_count_TK = wrong_TK - active_TKK.sum(-1)
        first_count_TK[:, 0] -= wrong_TK.sum(-1)
        slope_TV = torch.zeros_like(d.q_TV)
        slope_TV.scatter_add_(-1, first_TK, first_count_TK)
        slope_TV.scatter_add_(-1, second_TK, active_TKK.sum(-2))
        value_T = choice_TK.sum(-1) + pairs_TKK.sum((-2, -1))
        return value_T, softmax_gradient(slope_TV.mul_(d.q_TV), d)
