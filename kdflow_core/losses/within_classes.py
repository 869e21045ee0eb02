"""What a reverse KL of classes leaves out: how each side spells a text within its class.

By the chain rule, for the student q, the teacher p, and a run g of tokens that begins in the class
C on both sides: log q(g)/p(g) = log q(C)/p(C) + log q(g|C)/p(g|C). The divergence of classes has
the first part, exactly. The second is learned by policy gradient from the g that the student has
sampled, with the advantage A = log p(g|C) - log q(g|C) on each of its tokens: the expectation of
both gradients together is that of KL(q || p) over runs. A is zero for a token that is alone in its
class on both sides.

Dimensions: N tokens, H hidden size, K classes, S spans, R the student's tokens in spans, M the
teacher's.
"""

from collections.abc import Callable

import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.folding import Folding
from kdflow_core.losses.logits import LogitProducer, accumulation_dtype, row_chunks
from kdflow_core.losses.span_likelihood import Spans
from kdflow_core.losses.surrogate import clipped_surrogate

# How far the importance ratio of a sampled token may be from 1, as in `sampled_reverse_kl`.
CLIP = 0.2


@torch.no_grad()
def class_surprisals(
    hidden_NH: torch.Tensor,
    head: OutputHead,
    class_N: torch.Tensor,
    folded: Callable[[torch.Tensor], torch.Tensor],
    logits_bytes: int,
) -> torch.Tensor:
    """-log of the probability of each class, in nats, from hidden states a chunk of logits at a
    time; [N]. `folded` makes a head's logits those of classes [N, K].
    """
    dtype = accumulation_dtype(hidden_NH)
    producer = LogitProducer(head, dtype)
    found = [hidden_NH.new_zeros(0, dtype=dtype)]
    for rows in row_chunks(len(hidden_NH), len(head.weight_VH), logits_bytes, dtype):
        log_prob_CK = folded(producer.logits(hidden_NH[rows])).log_softmax(-1)
        chosen_C1 = class_N[rows, None]
        found.append(-log_prob_CK.gather(-1, chosen_C1).squeeze(-1))
    return torch.cat(found)


def advantages_within(
    *,
    spans: Spans,
    hidden_NH: torch.Tensor,
    head: OutputHead,
    target_ids_N: torch.Tensor,
    teacher_head: OutputHead,
    surprisal_S: tuple[torch.Tensor, torch.Tensor],
    folding: Folding,
    logits_bytes: int,
) -> torch.Tensor:
    """The advantage log p(g|C) - log q(g|C) of each span, in nats, [S], from both sides'
    `surprisal_S` of it; 0 where the two do not begin with a pair, or not in one class.
    """
    numbers_S = torch.arange(spans.count, device=spans.span_R.device)
    own_S = spans.row_R[torch.searchsorted(spans.span_R, numbers_S)]
    other_S = torch.searchsorted(spans.span_M, numbers_S)
    own_class_S = folding.student_V[target_ids_N[own_S]]
    other_class_S = folding.teacher_W[spans.target_ids_M[other_S]]
    own_class_surprisal_S = class_surprisals(
        hidden_NH[own_S], head, own_class_S, folding.student, logits_bytes
    )
    other_class_surprisal_S = class_surprisals(
        spans.hidden_MG[other_S], teacher_head, other_class_S, folding.teacher, logits_bytes
    )
    own_within_S = surprisal_S[0] - own_class_surprisal_S
    other_within_S = surprisal_S[1] - other_class_surprisal_S
    learned_S = spans.is_pair_S & (own_class_S == other_class_S)
    return torch.where(learned_S, own_within_S - other_within_S, 0.0)


def cross_entropy_weights(
    advantage_N: torch.Tensor, log_q_N: torch.Tensor, sampled_log_prob_N: torch.Tensor
) -> torch.Tensor:
    """The weights of the tokens' cross-entropies whose gradient is that of the surrogate, [N]."""
    _, slope_N = clipped_surrogate(
        log_q_T=log_q_N,
        sampled_log_prob_T=sampled_log_prob_N,
        advantage_T=advantage_N,
        clip_low=CLIP,
        clip_high=CLIP,
    )
    return -slope_N
