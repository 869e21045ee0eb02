"""GOLD's comparison of two tokenizers: tokens merged to spans, matched tokens by the Jensen-Shannon
divergence, all others by their ranks.

Patino et al., "Unlocking On-Policy Distillation for Any Model Family", 2025, as TRL's `ULDLoss` has
it; see `losses/merged_spans.py` for the formula. It is there to compare with: the folded classes of
`vanilla_kd` compare what conditions on the same text, and merged spans do not. Of N supervised
tokens and S spans,

    loss = (1 - r) sum_N CE + r sum_S D,    r `kd_ratio`.

Dimensions: N supervised tokens, S spans, L spans of several tokens of the student's, R the
student's tokens in spans, M the teacher's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema.algorithm import GoldConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    Teacher,
    whole_batch_loss,
)
from kdflow_core.contracts import HiddenSignal
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import ranks
from kdflow_core.losses.merged_spans import HybridDivergence, slopes
from kdflow_core.losses.span_likelihood import Spans, span_sums, surprisals
from kdflow_core.metrics import TAUGHT_TERMS


class Gold(Algorithm):
    """One teacher, at all spans; cross-entropy is of all tokens."""

    def __init__(self, config: GoldConfig, ingredients: Ingredients) -> None:
        super().__init__()
        spec, head = ingredients.spec, ingredients.heads["teacher"]
        sizes = ingredients.vocabulary_size, len(head.weight_VH)
        self._teacher = Teacher(head=head, reads_spans=True)
        self._columns = ranks(sizes, ingredients.shared_O2(), head.weight_VH.device)
        share = self._columns.matched / sizes[1]
        self._divergence = HybridDivergence(
            matched=self._columns.matched,
            matched_weight=share if config.matched_weight is None else config.matched_weight,
            beta=config.beta,
        )
        self._spec = spec
        self._merged = LossSpec(
            divergence=self._divergence,
            kd_ratio=1.0,
            logits_bytes=spec.logits_bytes,
            folding=self._columns,
        )
        self._alone = replace(spec, divergence=None, folding=None)

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return (self._teacher,)

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        (taught,) = batch.signals
        spans, spec = taught.spans, self._spec
        assert spans is not None
        ce_N = surprisals(student.hidden_NH, student.head, batch.target_ids_N, spec.logits_bytes)
        ce_R = ce_N[spans.row_R]
        x_M = surprisals(
            spans.hidden_MG, self._teacher.states_head, spans.target_ids_M, spec.logits_bytes
        )
        last_R, last_M = (_last(span, spans.count) for span in (spans.span_R, spans.span_M))
        before_S = span_sums(ce_R, spans.span_R, spans.count) - ce_R[last_R]
        told_S = span_sums(x_M, spans.span_M, spans.count) - x_M[last_M]
        log_mass_S2 = -torch.stack([before_S, told_S], -1)
        weight, row_S = batch.weight * spec.kd_ratio, spans.row_R[last_R]
        merged = distillation_loss(
            student_hidden_TH=student.hidden_NH[row_S],
            student_head=student.head,
            teacher=HiddenSignal(spans.hidden_MG[last_M], self._teacher.states_head),
            target_ids_T=batch.target_ids_N[row_S],
            weights_T=torch.full_like(before_S, weight),
            spec=self._merged,
            log_mass_T2=log_mass_S2,
        )
        extra_N = weight * self._of_earlier(student, spans, last_R, last_M, log_mass_S2)
        alone = whole_batch_loss(
            student, replace(batch, extra_ce_N=extra_N), teacher=None, spec=self._alone
        )
        terms = alone.terms | {name: merged.terms[name] for name in TAUGHT_TERMS}
        total = spec.kd_ratio * terms["kd"].sum()
        terms["loss"] = terms["loss"] + total / max(1, len(ce_N))
        return LossOutput(merged.loss + alone.loss, terms)

    def _of_earlier(
        self,
        student: Student,
        spans: Spans,
        last_R: torch.Tensor,
        last_M: torch.Tensor,
        log_mass_S2: torch.Tensor,
    ) -> torch.Tensor:
        """The weights of cross-entropies, [N], whose gradient is that of the spans for what comes
        before their last token: d log c = -d CE, of each of these.
        """
        is_earlier_R = torch.ones_like(spans.row_R, dtype=torch.bool)
        is_earlier_R[last_R] = False
        long_L = torch.unique(spans.span_R[is_earlier_R])
        slope_L = slopes(
            hidden_BH=student.hidden_NH[spans.row_R[last_R[long_L]]].detach(),
            head=student.head,
            teacher_hidden_BG=spans.hidden_MG[last_M[long_L]],
            teacher_head=self._teacher.states_head,
            log_mass_B2=log_mass_S2[long_L],
            columns=self._columns,
            divergence=self._divergence,
            logits_bytes=self._spec.logits_bytes,
        )
        slope_S = torch.zeros_like(log_mass_S2[:, 0])
        slope_S[long_L] = slope_L.to(slope_S.dtype)
        extra_N = slope_S.new_zeros(len(student.hidden_NH))
        earlier = spans.row_R[is_earlier_R]
        return extra_N.index_add_(0, earlier, -slope_S[spans.span_R[is_earlier_R]])


def _last(span: torch.Tensor, count: int) -> torch.Tensor:
    """The place of the last token of each span, [S], of tokens in the order of their spans."""
    numbers_S = torch.arange(count, device=span.device)
    return torch.searchsorted(span, numbers_S, right=True) - 1
