"""Model families: one record each, and the catalogue of them by architecture.

A family that is not here is refused by name, never guessed. Loads no model library.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kdflow_core.errors import ModelError
from kdflow_core.models.families.base import Family
from kdflow_core.models.families.named import NAMED
from kdflow_core.models.families.plain import PLAIN
from kdflow_core.models.families.scaled import SCALED

FAMILIES = (PLAIN, *SCALED, *NAMED)
BY_ARCHITECTURE: Mapping[str, Family] = MappingProxyType(
    {architecture: family for family in FAMILIES for architecture in family.architectures}
)


def known_family(config: Any) -> Family | None:
    """The family of a model's config, where kdflow knows it."""
    return BY_ARCHITECTURE.get(architecture_of(config))


def family_of(config: Any) -> Family:
    """The family of a model's config. Raises ModelError for one that is not known."""
    family = known_family(config)
    if family is None:
        raise ModelError(
            f"the output head of {architecture_of(config)} is not known to kdflow (tensor names, "
            "scale, soft-cap), so its logits cannot be rebuilt from hidden states; known: "
            f"{', '.join(sorted(BY_ARCHITECTURE))}. To add its family, see "
            "kdflow_core/models/families"
        )
    return family


def architecture_of(config: Any) -> str:
    """The class that a config names for its model."""
    return str((config.architectures or ["unknown"])[0])
