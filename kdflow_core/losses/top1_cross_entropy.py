"""Top-1 cross-entropy, -p(v*) log q(v*) at the teacher's most probable token v*.

Learning from the teacher's choice, as sequence-level distillation does (Kim and Rush, arXiv
1606.07947, section 3.2), token by token and weighed by its confidence. Not a divergence: it is not
zero for equal distributions. Of several most probable tokens the first counts.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Top1CrossEntropy:
    """Cross-entropy of the teacher's top-1 token, times its probability; nats per token."""

    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        log_p_T1, top_T1 = log_p_TV.max(-1, keepdim=True)
        p_T1 = log_p_T1.exp()
        value_T1 = -p_T1 * log_q_TV.gather(-1, top_T1)
        gradient_TV = (p_T1 * log_q_TV.exp()).scatter_add_(-1, top_T1, -p_T1)
        return value_T1.squeeze(-1), gradient_TV
