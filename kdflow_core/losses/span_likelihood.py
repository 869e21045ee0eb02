"""The likelihood of spans: how probable both models find a run of tokens that spells the same.

Approximate likelihood matching (ALM), Minixhofer et al., arXiv 2503.20083, section 3, in the limit
of its temperature, times that temperature: D = x log(x/y) - x + y, with the surprisals x of the
teacher and y of the student, in nats. It needs no map between vocabularies. Its gradient for the
student's logits is that of cross-entropy times 1 - x/y, which is what a span's tokens are weighed
by: it is zero where both find the span as probable, and pushes down where the student is surer.

Dimensions: N supervised tokens, R the student's tokens in spans, M the teacher's, S spans.
"""

from dataclasses import dataclass

import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec

SMALLEST = 1e-3  # nats: below, a span is certain, and the quotient says nothing


@dataclass(frozen=True, kw_only=True)
class Spans:
    """`count` spans: the rows [R] of the student's tokens and the span of each; the teacher's
    tokens [M] in spans, the span of each, and its states [M, G], or where it has none to give, the
    tokens' log-probabilities [M]. Those of `is_pair_S` begin with tokens of both sides that
    condition on the same text.
    """

    count: int
    row_R: torch.Tensor
    span_R: torch.Tensor
    hidden_MG: torch.Tensor
    target_ids_M: torch.Tensor
    span_M: torch.Tensor
    is_pair_S: torch.Tensor
    log_prob_M: torch.Tensor | None = None


def span_divergence(x_S: torch.Tensor, y_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of surprisals x and y, and its derivative by y; [S]."""
    x_S, y_S = x_S.clamp_min(SMALLEST), y_S.clamp_min(SMALLEST)
    quotient_S = x_S / y_S
    return x_S * quotient_S.log() - x_S + y_S, 1 - quotient_S


@torch.no_grad()
def surprisals(
    hidden_NH: torch.Tensor, head: OutputHead, target_ids_N: torch.Tensor, logits_bytes: int
) -> torch.Tensor:
    """-log p of each target, in nats, from hidden states a chunk of logits at a time; [N]."""
    output = distillation_loss(
        student_hidden_TH=hidden_NH,
        student_head=head,
        teacher=None,
        target_ids_T=target_ids_N,
        weights_T=torch.zeros(len(target_ids_N), device=hidden_NH.device),
        spec=LossSpec(divergence=None, kd_ratio=0.0, logits_bytes=logits_bytes),
    )
    return output.terms["cross_entropy"]


def span_sums(values: torch.Tensor, span: torch.Tensor, count: int) -> torch.Tensor:
    """The sums of some tokens' values over the span that each is in; [S]."""
    return values.new_zeros(count).index_add_(0, span, values)
