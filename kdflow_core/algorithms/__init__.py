"""Algorithms: from whom the student learns, on which tokens, with which weights.

`ALGORITHMS` is the catalogue: the `type` of an algorithm in the config -> its class.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from configs.schema.algorithm import Algorithm as AlgorithmConfig
from kdflow_core.algorithms.base import Algorithm, Ingredients
from kdflow_core.algorithms.dual_space import DualSpace
from kdflow_core.algorithms.gold import Gold
from kdflow_core.algorithms.multi_teacher import MultiTeacher
from kdflow_core.algorithms.self_distillation import SelfDistillation
from kdflow_core.algorithms.sft import SFT
from kdflow_core.algorithms.vanilla_kd import VanillaKD

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = MappingProxyType(
    {
        "sft": SFT,
        "vanilla_kd": VanillaKD,
        "dual_space": DualSpace,
        "gold": Gold,
        "multi_teacher": MultiTeacher,
        "self_distillation": SelfDistillation,
    }
)


def build_algorithm(config: AlgorithmConfig, ingredients: Ingredients) -> Algorithm:
    """The algorithm that a config asks for."""
    return ALGORITHMS[config.type](config, ingredients)
