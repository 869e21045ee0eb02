"""What a divergence is.

Notation: p teacher, q student, z the student's logits at temperature 1.
Dimensions: T tokens, V vocabulary.
"""

from typing import Protocol

import torch


class Divergence(Protocol):
    """A per-token divergence with its own logit gradient.

    `temperature` divides both models' logits before `value_and_gradient`.
    """

    temperature: float
    scale_by_temperature_squared: bool

    def __init__(
        self, *, temperature: float = 1.0, scale_by_temperature_squared: bool = False
    ) -> None: ...

    def value_and_gradient(
        self, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token [T], and their gradient [T, V] for the *tempered* student logits."""
        ...
