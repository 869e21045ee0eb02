"""Distillation of one teacher: cross-entropy and a divergence at every supervised token.

Hinton et al., arXiv 1503.02531; with `reverse_kl` or `generalized_jsd` on answers of the student's
own, one round of GKD, arXiv 2306.13649, algorithm 1. Between two tokenizers also the likelihood of
spans. Dimensions: N supervised tokens, M the teacher's tokens in spans, S spans.
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
    TokenSignal,
    partly_taught_loss,
    whole_batch_loss,
)
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.losses.span_likelihood import span_divergence, span_sums, surprisals


class VanillaKD(Algorithm):
    """One teacher, all tokens that it says something about; the others have cross-entropy alone."""

    def __init__(self, config: VanillaKDConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = ingredients.spec
        self._teacher = Teacher(
            head=ingredients.heads["teacher"], reads_spans=ingredients.spec.span_share > 0
        )

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return (self._teacher,)

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        (taught,) = batch.signals
        if taught.spans is None:
            return self._token_loss(student, batch, taught)
        spec, spans = self._spec, taught.spans
        ce_N = surprisals(student.hidden_NH, student.head, batch.target_ids_N, spec.logits_bytes)
        y_S = span_sums(ce_N[spans.row_R], spans.span_R, spans.count)
        log_p_M = surprisals(
            spans.hidden_MG, self._teacher.head, spans.target_ids_M, spec.logits_bytes
        )
        value_S, slope_S = span_divergence(span_sums(log_p_M, spans.span_M, spans.count), y_S)
        # By the chain rule: a span's surprisal is the sum of its tokens' cross-entropies.
        part = spec.kd_ratio * spec.span_share
        extra_N = torch.zeros_like(ce_N).index_add_(0, spans.row_R, slope_S[spans.span_R])
        extra_N *= batch.weight * part
        output = self._token_loss(student, replace(batch, extra_ce_N=extra_N), taught)
        terms = output.terms | {"span": value_S}
        total = part * value_S.sum()
        terms["loss"] = terms["loss"] + total / max(1, len(ce_N))
        return LossOutput(output.loss + batch.weight * total, terms)

    def _token_loss(self, student: Student, batch: MicroBatch, taught: TokenSignal) -> LossOutput:
        """Cross-entropy and the divergence, token by token."""
        if len(taught.index_K) == len(batch.target_ids_N):
            return whole_batch_loss(student, batch, teacher=taught.signal, spec=self._spec)
        return partly_taught_loss(student, batch, taught=taught, spec=self._spec)
