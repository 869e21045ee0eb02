"""Reverse KL, KL(q || p) = sum_v q (log q - log p), of MiniLLM, arXiv 2306.08543, equation 1.

Here over the full vocabulary at each token; its gradient is q (log q - log p - KL).
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """KL(student || teacher), nats per token."""

    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        q_TV = log_q_TV.exp()
        log_ratio_TV = log_q_TV - log_p_TV
        value_T = (q_TV * log_ratio_TV).sum(-1)
        return value_T, q_TV * (log_ratio_TV - value_T.unsqueeze(-1))
