"""Reverse KL, KL(q || p) = sum_v q (log q - log p), of MiniLLM, arXiv 2306.08543, equation 1.

Here over the full vocabulary at each token; its gradient is q (log q - log p - KL).
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(student || teacher), nats per token."""

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_ratio_TV = d.log_q_TV - d.log_p_TV
        value_T = d.over.dot(d.q_TV, log_ratio_TV)
        return value_T, log_ratio_TV.sub_(value_T.unsqueeze(-1)).mul_(d.q_TV)
