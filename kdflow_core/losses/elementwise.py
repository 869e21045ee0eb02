"""What happens between the logits and their gradient, for a few tokens at a time.

Dimensions: B tokens of a block, V vocabulary, K classes of tokens, M per-token terms.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kdflow_core.losses.base import Distributions, Divergence
from kdflow_core.losses.folding import Comparison
from kdflow_core.losses.surrogate import PolicyGradient, clipped_surrogate
from kdflow_core.losses.token_weights import TokenStatistics, TokenWeight
from kdflow_core.losses.vocabulary import ShardedVocabulary, WholeVocabulary
from kdflow_core.metrics import TAUGHT_TERMS, TERM_NAMES


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """(1 - kd_ratio) * cross-entropy + kd_ratio * token weight * divergence, and the policy
    gradient of tokens that have an advantage. Of `kd_ratio`, the likelihood of spans has the part
    `span_share`, and the divergence the rest.

    Without a divergence there is no teacher, and cross-entropy has the same part. `logits_bytes` is
    the memory for both models' logits of a chunk of tokens. `vocabulary` says whether heads are
    whole or spread over ranks. With a `folding`, the models have different vocabularies, and
    the divergence is of the classes that both are folded onto, or of their ranks;
    `within_classes` adds what a reverse KL of classes leaves out (see `within_classes.py`).
    """

    divergence: Divergence | None
    kd_ratio: float
    logits_bytes: int
    token_weight: TokenWeight | None = None
    policy_gradient: PolicyGradient | None = None
    vocabulary: WholeVocabulary | ShardedVocabulary = WholeVocabulary()
    folding: Comparison | None = None
    span_share: float = 0.0
    within_classes: bool = False

    @property
    def reads_spans(self) -> bool:
        """Whether the loss is also of runs of tokens that spell the same."""
        return self.span_share > 0 or self.within_classes

    @property
    def divergence_weight(self) -> float:
        """What the divergence has of the loss."""
        return self.kd_ratio * (1 - self.span_share)


class Block(NamedTuple):
    """Both models' logits [B, V] of some tokens, each over its own vocabulary, and what is known of
    these, [B]. A token that was not sampled has the advantage 0. `extra_ce_B` is a further weight
    of cross-entropy, which has a part in the gradient alone; for `log_mass_B2` see `Distributions`.
    """

    student_BV: torch.Tensor
    teacher_BV: torch.Tensor | None
    target_ids_B: torch.Tensor
    weights_B: torch.Tensor
    sampled_log_prob_B: torch.Tensor | None
    advantage_B: torch.Tensor | None
    extra_ce_B: torch.Tensor | None = None
    log_mass_B2: torch.Tensor | None = None


def block_terms(block: Block, spec: LossSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The token terms [M, B] of `metrics`, and the gradient [B, V] of the weighted loss for the
    student's logits.

    The divergence is at its temperature, all others are at 1. What needs a teacher is 0 without.
    """
    if spec.folding is not None and block.teacher_BV is not None:
        return _folded_terms(block, spec, spec.folding, block.teacher_BV)
    over = spec.vocabulary
    log_q_BV, q_BV = over.distribution(block.student_BV)
    cross_entropy_B = -over.at(log_q_BV, block.target_ids_B)
    student_entropy_B = -over.dot(q_BV, log_q_BV)
    ce_weight_B = block.weights_B * (1 - spec.kd_ratio)
    has_ce = spec.kd_ratio < 1
    if block.extra_ce_B is not None:
        ce_weight_B, has_ce = ce_weight_B + block.extra_ce_B, True
    loss_B = cross_entropy_B * (1 - spec.kd_ratio)
    if block.teacher_BV is None or spec.divergence is None:
        zero_B = torch.zeros_like(loss_B)
        terms = dict.fromkeys(TERM_NAMES, zero_B)
        terms |= {"loss": loss_B, "cross_entropy": cross_entropy_B}
        terms["student_entropy"] = student_entropy_B
        gradient_BV = q_BV.mul_(ce_weight_B.unsqueeze(-1))
    else:
        log_p_BV, p_BV = over.distribution(block.teacher_BV)
        top_B = over.top1(block.teacher_BV)
        agreement_B = over.top1(block.student_BV) == top_B
        teacher_entropy_B = -over.dot(p_BV, log_p_BV)
        statistics = TokenStatistics(
            student_entropy_T=student_entropy_B,
            teacher_entropy_T=teacher_entropy_B,
            teacher_top_T=over.at(p_BV, top_B),
            vocabulary=over.size(block.student_BV),
        )
        kd_ratio_B = torch.full_like(loss_B, spec.divergence_weight)
        if spec.token_weight is not None:
            kd_ratio_B *= spec.token_weight(statistics)
        at_one = Distributions(
            log_q_BV,
            q_BV,
            log_p_BV,
            p_BV,
            over,
            block.target_ids_B,
            block.sampled_log_prob_B,
            block.log_mass_B2,
        )
        divergence_B, gradient_BV = _tempered_divergence(block, spec.divergence, at_one)
        gradient_BV.mul_((block.weights_B * kd_ratio_B).unsqueeze(-1))
        if has_ce:
            gradient_BV.addcmul_(q_BV, ce_weight_B.unsqueeze(-1))
        terms = {
            "loss": loss_B + kd_ratio_B * divergence_B,
            "kd": divergence_B,
            "cross_entropy": cross_entropy_B,
            "forward_kl": -teacher_entropy_B - over.dot(p_BV, log_q_BV),
            "student_entropy": student_entropy_B,
            "teacher_entropy": teacher_entropy_B,
            "agreement": agreement_B.to(loss_B.dtype),
        }
    if has_ce:
        over.add_at_(gradient_BV, block.target_ids_B, -ce_weight_B)
    if spec.policy_gradient is not None and block.advantage_B is not None:
        value_B = _add_policy_gradient_(
            gradient_BV, block, -cross_entropy_B, log_q_BV, spec, spec.policy_gradient
        )
        terms["loss"] = terms["loss"] + value_B
    return torch.stack([terms[name] for name in TERM_NAMES]), gradient_BV


def _folded_terms(
    block: Block, spec: LossSpec, folding: Comparison, teacher_BV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where vocabularies differ: cross-entropy over the student's tokens, and what
    compares it with the teacher over classes.
    """
    own_MB, gradient_BV = block_terms(block._replace(teacher_BV=None), spec)
    folded_BK = folding.student(block.student_BV)
    classes = block._replace(
        student_BV=folded_BK,
        teacher_BV=folding.teacher(teacher_BV),
        target_ids_B=folding.student_class(block.target_ids_B),
        weights_B=block.weights_B * spec.divergence_weight,
        extra_ce_B=None,
    )
    alone = replace(spec, kd_ratio=1.0, span_share=0.0, policy_gradient=None, folding=None)
    taught_MB, gradient_BK = block_terms(classes, alone)
    gradient_BV += folding.unfolded(gradient_BK, folded_BK, block.student_BV)
    terms = dict(zip(TERM_NAMES, own_MB, strict=True))
    taught = dict(zip(TERM_NAMES, taught_MB, strict=True))
    terms |= {name: taught[name] for name in TAUGHT_TERMS}
    terms["loss"] = terms["loss"] + spec.divergence_weight * taught["loss"]
    return torch.stack([terms[name] for name in TERM_NAMES]), gradient_BV


def _add_policy_gradient_(
    gradient_BV: torch.Tensor,
    block: Block,
    log_q_B: torch.Tensor,
    log_q_BV: torch.Tensor,
    spec: LossSpec,
    policy_gradient: PolicyGradient,
) -> torch.Tensor:
    """Add its gradient; -weight * ratio * advantage, [B]."""
    assert block.advantage_B is not None
    assert block.sampled_log_prob_B is not None
    sampled_B = torch.where(block.advantage_B == 0, log_q_B, block.sampled_log_prob_B)
    ratio_B, slope_B = clipped_surrogate(
        log_q_T=log_q_B,
        sampled_log_prob_T=sampled_B,
        advantage_T=block.advantage_B,
        clip_low=policy_gradient.clip_low,
        clip_high=policy_gradient.clip_high,
    )
    slope_B = slope_B * block.weights_B * policy_gradient.weight
    gradient_BV.addcmul_(log_q_BV.exp(), slope_B.unsqueeze(-1), value=-1)
    spec.vocabulary.add_at_(gradient_BV, block.target_ids_B, slope_B)
    return -policy_gradient.weight * ratio_B * block.advantage_B


def _tempered_divergence(
    block: Block, divergence: Divergence, at_one: Distributions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence at its temperature [B], and its gradient [B, V] for the logits themselves."""
    temperature = divergence.temperature
    if temperature == 1.0:
        return divergence.value_and_gradient(at_one)
    assert block.teacher_BV is not None
    log_q_BV, q_BV = at_one.over.distribution(block.student_BV / temperature)
    log_p_BV, p_BV = at_one.over.distribution(block.teacher_BV / temperature)
    tempered = at_one._replace(log_q_TV=log_q_BV, q_TV=q_BV, log_p_TV=log_p_BV, p_TV=p_BV)
    value_B, gradient_BV = divergence.value_and_gradient(tempered)
    squared = temperature**2 if divergence.scale_by_temperature_squared else 1.0
    return value_B * squared, gradient_BV.mul_(squared / temperature)
