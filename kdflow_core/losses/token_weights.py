"""How much the divergence of a token counts: a factor in [0, 1] from what the models know of it.

The factor is a constant to the gradient, and does not touch cross-entropy. The loss is still
divided by the number of tokens, so that most factors make it smaller.
Dimensions: T tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch

from configs.schema.loss import TokenWeight as TokenWeightConfig


class TokenStatistics(NamedTuple):
    """Of every token, at temperature 1, [T]: both entropies in nats, and the teacher's largest
    probability; and the vocabulary's size.
    """

    student_entropy_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    teacher_top_T: torch.Tensor
    vocabulary: int


class TokenWeight(Protocol):
    """A rule for the factor."""

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        """The factors, [T]."""
        ...


@dataclass(frozen=True, kw_only=True)
class TeacherConfidence:
    """The teacher's largest probability to a power: what it is unsure of counts less."""

    power: float = 1.0

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        """See `TokenWeight`."""
        return statistics.teacher_top_T**self.power


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """A model's entropy over the largest possible, log V; or one minus that.

    With the student's, high: tokens at which it is undecided ("forking" ones) count most, in the
    spirit of arXiv 2506.01939, which keeps the 20 % of highest entropy; here by degrees.
    """

    of: Literal["student", "teacher"] = "student"
    favour: Literal["high", "low"] = "high"

    def __call__(self, statistics: TokenStatistics) -> torch.Tensor:
        """See `TokenWeight`."""
        entropy_T = (
            statistics.student_entropy_T if self.of == "student" else statistics.teacher_entropy_T
        )
        share_T = (entropy_T / math.log(max(2, statistics.vocabulary))).clamp(0, 1)
        return share_T if self.favour == "high" else 1 - share_T


TOKEN_WEIGHTS: Mapping[str, Callable[..., TokenWeight]] = MappingProxyType(
    {"teacher_confidence": TeacherConfidence, "entropy": Entropy}
)


def build_token_weight(config: TokenWeightConfig | None) -> TokenWeight | None:
    """The rule that a config asks for; None where all tokens count the same."""
    if config is None:
        return None
    return TOKEN_WEIGHTS[config.type](**config.model_dump(exclude={"type"}))
