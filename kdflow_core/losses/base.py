"""What a divergence is.

Notation: p teacher, q student, z the student's logits at temperature 1.
Dimensions: T tokens, V vocabulary.
"""

from typing import Protocol

import torch


class Divergence(Protocol):
    """A per-token divergence with its own logit gradient.

    The mechanism divides the logits by `temperature`; a divergence sees tempered ones only.
    """

    @property
    def temperature(self) -> float:
        """What divides both models' logits."""
        ...

    @property
    def scale_by_temperature_squared(self) -> bool:
        """Whether the divergence is multiplied by the temperature's square."""
        ...

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token [T], and their gradient [T, V] for the *tempered* student logits."""
        ...


def softmax_gradient(u_TV: torch.Tensor, q_TV: torch.Tensor) -> torch.Tensor:
    """The gradient for the student's logits of a sum over the vocabulary of l_v(q_v), from
    u_v = q_v dl_v/dq_v: the softmax's Jacobian takes it to u - q sum_v u_v.
    """
    return u_TV - q_TV * u_TV.sum(-1, keepdim=True)
