"""The divergences and how they mix with cross-entropy."""

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import StrictModel


class _Tempered(StrictModel):
    """`temperature` divides both models' logits. `scale_by_temperature_squared` multiplies the
    divergence by its square, as Hinton et al. (1503.02531) do; GKD and TRL do not.
    """

    temperature: float = Field(default=1.0, gt=0)
    scale_by_temperature_squared: bool = False


class ForwardKLConfig(_Tempered):
    """KL(teacher || student)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKLConfig(_Tempered):
    """KL(student || teacher)."""

    type: Literal["reverse_kl"] = "reverse_kl"


Divergence = Annotated[ForwardKLConfig | ReverseKLConfig, Field(discriminator="type")]


class LossConfig(StrictModel):
    """loss = (1 - kd_ratio) * cross-entropy + kd_ratio * divergence, per supervised token.

    `chunk_tokens` rows of logits exist at a time; it changes memory, not the result.
    """

    divergence: Divergence = Field(default_factory=ForwardKLConfig)
    kd_ratio: float = Field(default=0.9, ge=0, le=1)
    chunk_tokens: int = Field(default=256, gt=0)
