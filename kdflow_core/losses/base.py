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
