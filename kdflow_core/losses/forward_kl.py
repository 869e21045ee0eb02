"""Forward KL, KL(p || q) = sum_v p (log p - log q), of Hinton et al., arXiv 1503.02531, section 2.

The paper trains on soft targets' cross-entropy, which differs by the teacher's entropy: same
gradient, q - p, and zero at equality. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL(teacher || student), nats per token."""

    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        p_TV = log_p_TV.exp()
        value_T = (p_TV * (log_p_TV - log_q_TV)).sum(-1)
        return value_T, log_q_TV.exp() - p_TV
