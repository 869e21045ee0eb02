"""Spans as single steps: what two models say of the last token of a run that spells the same, times
the probability of the tokens before it in the run.

The comparison of GOLD (Patino et al., "Unlocking On-Policy Distillation for Any Model Family",
2025; TRL's `ULDLoss` with `use_extended_uld`, the hybrid loss and the merge strategy `bayesian`):
tokens that both vocabularies have by the generalized Jensen-Shannon divergence, all others by their
ranks, as universal logit distillation does (ULD, arXiv 2402.12030, equation 3). With c and c' the
probabilities of what comes before, and q and p the distributions of the last token,

    w JSD_beta(c' p, c q) over matched tokens + (1 - w) |sort(c' p) - sort(c q)| over the others.

So c and c' are the masses of the two distributions. What the student's tokens before the last one
learn is in the `slopes`.

Dimensions: B tokens, V and W vocabularies of student and teacher, O matched tokens, K columns: the
matched tokens, and as many ranks as the others of the larger side are.
"""

from dataclasses import dataclass

import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient
from kdflow_core.losses.folding import Ranks
from kdflow_core.losses.logits import LogitProducer, accumulation_dtype, row_chunks
from kdflow_core.losses.vocabulary import WholeVocabulary


@dataclass(frozen=True, kw_only=True)
class HybridDivergence(Divergence):
    """The comparison above, over columns of which the first `matched` are of matched tokens; these
    have the weight `matched_weight`, and `beta` is the teacher's share of their mixture, in (0, 1).
    It reads `log_mass_T2`.
    """

    matched: int
    matched_weight: float
    beta: float

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        value_T, u_TV = self.value_and_u(d)
        return value_T, softmax_gradient(u_TV, d)

    def value_and_u(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """The value, [T], and u = q dD/dq, [T, V], for the student's q with its mass."""
        q_TV, p_TV = d.q_TV, d.p_TV
        if d.log_mass_T2 is not None:
            own_T1, other_T1 = d.log_mass_T2.exp().split(1, -1)  # type: ignore[no-untyped-call]
            q_TV, p_TV = q_TV * own_T1, p_TV * other_T1
        tiny = torch.finfo(q_TV.dtype).tiny
        q_TO, p_TO = q_TV[:, : self.matched], p_TV[:, : self.matched]
        log_m_TO = torch.lerp(q_TO, p_TO, self.beta).clamp_min(tiny).log()
        to_q_TO = q_TO.clamp_min(tiny).log() - log_m_TO
        to_p_TO = p_TO.clamp_min(tiny).log() - log_m_TO
        jsd_T = (self.beta * p_TO * to_p_TO + (1 - self.beta) * q_TO * to_q_TO).sum(-1)
        apart_TR = q_TV[:, self.matched :] - p_TV[:, self.matched :]
        other = 1 - self.matched_weight
        u_TV = torch.cat(
            [
                self.matched_weight * (1 - self.beta) * q_TO * to_q_TO,
                other * q_TV[:, self.matched :] * apart_TR.sign(),
            ],
            -1,
        )
        return self.matched_weight * jsd_T + other * apart_TR.abs().sum(-1), u_TV


@torch.no_grad()
def slopes(
    *,
    hidden_BH: torch.Tensor,
    head: OutputHead,
    teacher_hidden_BG: torch.Tensor,
    teacher_head: OutputHead,
    log_mass_B2: torch.Tensor,
    columns: Ranks,
    divergence: HybridDivergence,
    logits_bytes: int,
) -> torch.Tensor:
    """The derivative of the divergence by the logarithm of the student's mass, [B], a chunk of
    logits at a time.
    """
    dtype = accumulation_dtype(hidden_BH)
    own, other = LogitProducer(head, dtype), LogitProducer(teacher_head, dtype)
    over, found = WholeVocabulary(), [hidden_BH.new_zeros(0, dtype=dtype)]
    for rows in row_chunks(len(hidden_BH), max(columns.sizes), logits_bytes, dtype):
        log_q_BK = over.log_softmax(columns.student(own.logits(hidden_BH[rows])))
        log_p_BK = over.log_softmax(columns.teacher(other.logits(teacher_hidden_BG[rows])))
        d = Distributions(
            log_q_BK,
            log_q_BK.exp(),
            log_p_BK,
            log_p_BK.exp(),
            over,
            target_ids_T=torch.zeros_like(log_q_BK[:, 0], dtype=torch.int64),
            sampled_log_prob_T=None,
            log_mass_T2=log_mass_B2[rows].to(dtype),
        )
        found.append(divergence.value_and_u(d)[1].sum(-1))
    return torch.cat(found)
