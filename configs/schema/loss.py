"""The divergences and how they mix with cross-entropy."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, StrictModel


class _Tempered(StrictModel):
    """What all divergences have. One that `NEEDS_WHOLE_VOCABULARY` cannot run over a vocabulary
    that is spread over ranks. One that is `OF_CLASSES` is homogeneous of degree 1 in both models'
    probabilities, and so means the same for tokens and for classes of tokens.
    """

    NEEDS_WHOLE_VOCABULARY: ClassVar[bool] = False
    OF_CLASSES: ClassVar[bool] = True

    temperature: float = Field(default=1.0, gt=0)
    """What both models' logits are divided by."""
    scale_by_temperature_squared: bool = False
    """Multiply the divergence by the squared temperature, as Hinton et al. (1503.02531) do; GKD and
    TRL do not.
    """


class ForwardKLConfig(_Tempered):
    """KL(teacher || student)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKLConfig(_Tempered):
    """KL(student || teacher)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class GeneralizedJSDConfig(_Tempered):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student;
    `beta` 0 is KL(teacher || student), 1 is KL(student || teacher).
    """

    type: Literal["generalized_jsd"] = "generalized_jsd"
    beta: float = Field(default=0.5, ge=0, le=1)
    """The teacher's share of the mixture; 0 is KL(teacher || student), 1 is KL(student || teacher).
    """


class SkewedKLConfig(_Tempered):
    """KL(teacher || alpha teacher + (1 - alpha) student)."""

    type: Literal["skewed_kl"] = "skewed_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """The teacher's share of the mixture."""


class SkewedReverseKLConfig(_Tempered):
    """KL(student || (1 - alpha) teacher + alpha student)."""

    type: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """The student's share of the mixture."""


class AdaptiveKLConfig(_Tempered):
    """Forward and reverse KL, weighed by how far the student is off in the teacher's head (its top
    tokens, with a mass of `head_mass`) and in its tail.
    """

    NEEDS_WHOLE_VOCABULARY = True

    type: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(default=0.5, gt=0, lt=1)
    """The probability of the teacher's top tokens that count as its head."""


class TotalVariationConfig(_Tempered):
    """Half the sum of absolute differences."""

    type: Literal["total_variation"] = "total_variation"


class Top1CrossEntropyConfig(_Tempered):
    """Cross-entropy of the teacher's most probable token, times its probability."""

    OF_CLASSES = False

    type: Literal["top1_cross_entropy"] = "top1_cross_entropy"


class AlphaBetaConfig(_Tempered):
    """The alpha-beta divergence; (1, 0) would be KL(teacher || student), (0, 1) the reverse."""

    OF_CLASSES = False

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(default=0.2, gt=0)
    """The exponent of the teacher's probabilities."""
    beta: float = Field(default=0.7, gt=0)
    """The exponent of the student's probabilities."""


class AlphaDivergenceConfig(_Tempered):
    """Amari's alpha divergence; 1 would be KL(teacher || student), 0 the reverse."""

    type: Literal["alpha_divergence"] = "alpha_divergence"
    alpha: float = Field(default=0.5, gt=0, lt=1)
    """The order of the divergence."""


class HierarchicalRankingConfig(_Tempered):
    """Hinges on the student's order of both models' `top_k` tokens."""

    NEEDS_WHOLE_VOCABULARY = True
    OF_CLASSES = False

    type: Literal["hierarchical_ranking"] = "hierarchical_ranking"
    top_k: int = Field(default=5, gt=1, le=MOST)
    """How many of both models' top tokens are ranked."""


class SampledReverseKLConfig(_Tempered):
    """KL(student || teacher) estimated from the sampled token, as a policy gradient: the importance
    ratio stays within [1 - clip_low, 1 + clip_high]. For answers that the student sampled.
    """

    OF_CLASSES = False

    type: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """How far below 1 the importance ratio may be."""
    clip_high: float = Field(default=0.2, gt=0)
    """How far above 1 the importance ratio may be."""


SingleDivergence = Annotated[
    ForwardKLConfig
    | ReverseKLConfig
    | GeneralizedJSDConfig
    | SkewedKLConfig
    | SkewedReverseKLConfig
    | AdaptiveKLConfig
    | TotalVariationConfig
    | Top1CrossEntropyConfig
    | AlphaBetaConfig
    | AlphaDivergenceConfig
    | HierarchicalRankingConfig
    | SampledReverseKLConfig,
    Field(discriminator="type"),
]


class WeightedTerm(StrictModel):
    """A divergence and its weight in a sum."""

    weight: float = Field(gt=0)
    """What the divergence is multiplied by."""
    divergence: SingleDivergence
    """One of the single divergences, without a temperature of its own."""


class WeightedSumConfig(_Tempered):
    """sum of weight * divergence. The temperature is given here, for all terms."""

    type: Literal["weighted_sum"] = "weighted_sum"
    terms: tuple[WeightedTerm, ...] = Field(min_length=1, strict=False)
    """The divergences and their weights."""

    @model_validator(mode="after")
    def _one_temperature(self) -> "WeightedSumConfig":
        for term in self.terms:
            tempered = term.divergence
            if tempered.temperature != 1 or tempered.scale_by_temperature_squared:
                raise ValueError(
                    f"`{tempered.type}` in a weighted_sum has a temperature of its own; give "
                    "`temperature` and `scale_by_temperature_squared` for the sum instead"
                )
        return self


# What the tokens of two vocabularies are compared by: classes of them.
ClassMap = Literal["folded", "first_piece", "byte_prefix", "shared_tail"]
ComparedBy = Literal[ClassMap, "ranks"]

Divergence = Annotated[SingleDivergence | WeightedSumConfig, Field(discriminator="type")]


class TeacherConfidenceConfig(StrictModel):
    """A token's divergence counts by the teacher's largest probability to a `power`."""

    type: Literal["teacher_confidence"] = "teacher_confidence"
    power: float = Field(default=1.0, gt=0)
    """The exponent of the teacher's largest probability."""


class EntropyConfig(StrictModel):
    """A token's divergence counts by the entropy `of` a model over the largest possible (`high`),
    or by one minus that (`low`).
    """

    type: Literal["entropy"] = "entropy"
    of: Literal["student", "teacher"] = "student"
    """Whose entropy counts."""
    favour: Literal["high", "low"] = "high"
    """Whether tokens of `high` or of `low` entropy count more."""


TokenWeight = Annotated[TeacherConfidenceConfig | EntropyConfig, Field(discriminator="type")]


class LossConfig(StrictModel):
    """loss = (1 - kd_ratio) * cross-entropy + kd_ratio * token_weight * divergence, per supervised
    token.
    """

    divergence: Divergence = Field(default_factory=ForwardKLConfig)
    """How far the student's distribution is from the teacher's: one of the divergences in
    `kdflow_core/losses`, for instance `{type: generalized_jsd, beta: 0.3}`.
    """
    kd_ratio: float = Field(default=0.9, ge=0, le=1)
    """The teacher's share of the loss: the divergence's; cross-entropy has the rest."""
    span_share: float = Field(default=0.0, ge=0, le=1)
    """Between two tokenizers, the part of `kd_ratio` that the likelihood of spans has: how probable
    both models find each run of tokens that spells the same (ALM's limit, 2503.20083). The
    divergence has the rest, at 1 nothing: a replay then stores 4 bytes of a token, and no states of
    the training data.
    """
    within_classes: bool = False
    """Between two tokenizers, for `reverse_kl` on what the student has sampled: learn also how it
    spells a text that falls in one class with the teacher's, by a policy gradient (clipped as that
    of `sampled_reverse_kl` is). With it the whole reverse KL of texts is learned.
    """
    compared_by: ComparedBy = "folded"
    """Between two tokenizers, what the divergence compares: `folded` (both vocabularies folded onto
    the tokens that they share), `first_piece` and `byte_prefix` (a token of the teacher as the one
    of the student that its text begins with), `shared_tail` (the shared tokens, all others as one),
    or `ranks` (probabilities in falling order, whatever their tokens: ULD, 2402.12030, with
    `total_variation`). Evaluation goes by `folded` for all of them.
    """
    token_weight: TokenWeight | None = None
    """Which tokens' divergence counts more: `{type: teacher_confidence}` or `{type: entropy, of:
    student, favour: high}`; by default all count the same.
    """
    logits_memory_mb: int = Field(default=512, gt=0, le=MOST)
    """How much memory logits take at a time, at most, in MB; lower it when memory runs out. The
    result stays the same.
    """

    @model_validator(mode="after")
    def _within_fits(self) -> "LossConfig":
        if self.within_classes and (
            self.divergence.type != "reverse_kl"
            or self.divergence.temperature != 1
            or self.compared_by == "ranks"
            or self.span_share == 1
        ):
            raise ValueError(
                "`within_classes` adds what reverse_kl of classes leaves out; set "
                "divergence={type: reverse_kl} at temperature 1, compared_by=folded and span_share "
                "below 1"
            )
        return self

    @property
    def of_two_tokenizers(self) -> str | None:
        """The fields that are set and mean nothing between models of one tokenizer."""
        if self.compared_by != "folded":
            return f"loss.compared_by={self.compared_by}"
        if self.within_classes:
            return "loss.within_classes"
        return f"loss.span_share={self.span_share:g}" if self.span_share else None

    @property
    def learns_from_samples(self) -> str | None:
        """The setting by which the loss reads the log-probabilities that tokens were sampled with,
        if one does.
        """
        if any(isinstance(term, SampledReverseKLConfig) for term in self._terms):
            return "loss.divergence sampled_reverse_kl"
        return "loss.within_classes" if self.within_classes else None

    @property
    def needs_whole_vocabulary(self) -> bool:
        """Whether the divergence cannot do with a part of the vocabulary on each rank."""
        return any(term.NEEDS_WHOLE_VOCABULARY for term in self._terms)

    @property
    def is_of_classes(self) -> bool:
        """Whether the divergence can compare classes of tokens."""
        return all(term.OF_CLASSES for term in self._terms)

    @property
    def _terms(self) -> Sequence[_Tempered]:
        if isinstance(self.divergence, WeightedSumConfig):
            return [term.divergence for term in self.divergence.terms]
        return [self.divergence]
