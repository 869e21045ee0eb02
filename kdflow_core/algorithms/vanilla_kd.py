"""Distillation of one teacher: cross-entropy and a divergence at every supervised token.

Hinton et al., arXiv 1503.02531; with `reverse_kl` or `generalized_jsd` on answers of the student's
own, one round of GKD, arXiv 2306.13649, algorithm 1. Between two tokenizers also the likelihood of
spans, and what a divergence of classes leaves out. Dimensions: N supervised tokens, M the teacher's
tokens in spans, S spans.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema.algorithm import VanillaKDConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    Teacher,
    taught_loss,
)
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.losses.folding import Folding
from kdflow_core.losses.span_likelihood import Spans, span_divergence, span_sums, surprisals
from kdflow_core.losses.within_classes import advantages_within, cross_entropy_weights
from kdflow_core.metrics import TAUGHT_TERMS


class VanillaKD(Algorithm):
    """One teacher, all tokens that it says something about; the others have cross-entropy alone."""

    def __init__(self, config: VanillaKDConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = spec = ingredients.spec
        head = ingredients.heads.get("teacher")
        if head is None:  # the likelihood of spans is at hand, and all that is learned from
            self._spec = replace(spec, divergence=None, token_weight=None, folding=None)
        self._teacher = Teacher(head=head, reads_spans=spec.reads_spans)

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return (self._teacher,)

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        (taught,) = batch.signals
        if taught.spans is None:
            return taught_loss(student, batch, taught=taught, spec=self._spec)
        spec, spans = self._spec, taught.spans
        ce_N = surprisals(student.hidden_NH, student.head, batch.target_ids_N, spec.logits_bytes)
        if spans.log_prob_M is None:
            head = self._teacher.states_head
            x_M = surprisals(spans.hidden_MG, head, spans.target_ids_M, spec.logits_bytes)
        else:
            x_M = -spans.log_prob_M.to(ce_N)
        x_S = span_sums(x_M, spans.span_M, spans.count)
        y_S = span_sums(ce_N[spans.row_R], spans.span_R, spans.count)
        extra_N, total, terms = torch.zeros_like(ce_N), ce_N.new_zeros(()), {}
        if spec.span_share:
            part = spec.kd_ratio * spec.span_share
            terms["span"], slope_S = span_divergence(x_S, y_S)
            # By the chain rule: a span's surprisal is the sum of its tokens' cross-entropies.
            extra_N.index_add_(0, spans.row_R, part * slope_S[spans.span_R])
            total = total + part * terms["span"].sum()
        if spec.within_classes and isinstance(spec.folding, Folding):
            part = spec.divergence_weight
            advantage_S = advantages_within(
                spans=spans,
                hidden_NH=student.hidden_NH,
                head=student.head,
                target_ids_N=batch.target_ids_N,
                teacher_head=self._teacher.states_head,
                surprisal_S=(y_S, x_S),
                folding=spec.folding,
                logits_bytes=spec.logits_bytes,
            )
            terms["within_classes"] = -advantage_S
            extra_N += part * _within(batch, spans, advantage_S, ce_N)
            total = total - part * advantage_S.sum()
        extra_N *= batch.weight
        output = taught_loss(student, replace(batch, extra_ce_N=extra_N), taught=taught, spec=spec)
        terms = output.terms | terms
        if taught.signal is None:
            terms = {name: values for name, values in terms.items() if name not in TAUGHT_TERMS}
        terms["loss"] = terms["loss"] + total / max(1, len(ce_N))
        return LossOutput(output.loss + batch.weight * total, terms)


def _within(
    batch: MicroBatch, spans: Spans, advantage_S: torch.Tensor, ce_N: torch.Tensor
) -> torch.Tensor:
    """The weights of cross-entropies, [N], of a policy gradient with these advantages."""
    advantage_N = torch.zeros_like(ce_N)
    advantage_N.index_add_(0, spans.row_R, advantage_S[spans.span_R])
    assert batch.sampled_log_prob_N is not None  # the config refuses others
    return cross_entropy_weights(advantage_N, -ce_N, batch.sampled_log_prob_N)
