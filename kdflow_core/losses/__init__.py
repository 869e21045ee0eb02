"""Divergences and the chunked mechanism that applies them to hidden states.

`LOSSES` is the catalogue: the `type` of a divergence in the config -> its class.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from configs.schema.loss import Divergence as DivergenceConfig
from configs.schema.loss import WeightedSumConfig
from kdflow_core.losses.adaptive_kl import AdaptiveKL
from kdflow_core.losses.alpha_beta import AlphaBeta
from kdflow_core.losses.alpha_divergence import AlphaDivergence
from kdflow_core.losses.base import Divergence
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.losses.generalized_jsd import GeneralizedJSD
from kdflow_core.losses.hierarchical_ranking import HierarchicalRanking
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.losses.sampled_reverse_kl import SampledReverseKL
from kdflow_core.losses.skewed_kl import SkewedKL
from kdflow_core.losses.skewed_reverse_kl import SkewedReverseKL
from kdflow_core.losses.top1_cross_entropy import Top1CrossEntropy
from kdflow_core.losses.total_variation import TotalVariation
from kdflow_core.losses.weighted_sum import WeightedSum

LOSSES: Mapping[str, Callable[..., Divergence]] = MappingProxyType(
    {
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "generalized_jsd": GeneralizedJSD,
        "skewed_kl": SkewedKL,
        "skewed_reverse_kl": SkewedReverseKL,
        "adaptive_kl": AdaptiveKL,
        "total_variation": TotalVariation,
        "top1_cross_entropy": Top1CrossEntropy,
        "alpha_beta": AlphaBeta,
        "alpha_divergence": AlphaDivergence,
        "hierarchical_ranking": HierarchicalRanking,
        "sampled_reverse_kl": SampledReverseKL,
    }
)


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence that a config asks for; its fields are the constructor's arguments."""
    if isinstance(config, WeightedSumConfig):
        return WeightedSum(
            weights=tuple(term.weight for term in config.terms),
            terms=tuple(build_divergence(term.divergence) for term in config.terms),
            temperature=config.temperature,
            scale_by_temperature_squared=config.scale_by_temperature_squared,
        )
    return LOSSES[config.type](**config.model_dump(exclude={"type"}))
