"""Divergences and the chunked mechanism that applies them to hidden states.

`LOSSES` is the catalogue: the `type` of a divergence in the config -> its class.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from configs.schema.loss import Divergence as DivergenceConfig
from kdflow_core.losses.base import Divergence
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.losses.reverse_kl import ReverseKL

LOSSES: Mapping[str, Callable[..., Divergence]] = MappingProxyType(
    {"forward_kl": ForwardKL, "reverse_kl": ReverseKL}
)


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence that a config asks for; its fields are the constructor's arguments."""
    return LOSSES[config.type](**config.model_dump(exclude={"type"}))
