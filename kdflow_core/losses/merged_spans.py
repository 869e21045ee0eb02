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

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.base import Distributions, Divergence, softmax_gradient
from kdflow_core.losses.logits import LogitProducer, accumulation_dtype
from kdflow_core.losses.vocabulary import WholeVocabulary


@dataclass(frozen=True, kw_only=True)
class MatchedRanks:
    """Matched tokens side by side, then the others of either side in falling order; a `Comparison`.
    The ids of all of a side, [V] or [W]: first the O matched ones.
    """

    student_V: torch.Tensor
    teacher_W: torch.Tensor
    matched: int

    @property
    def sizes(self) -> tuple[int, int]:
        """See `Comparison`."""
        return len(self.student_V), len(self.teacher_W)

    def student(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._columns(logits_BV, self.student_V)

    def teacher(self, logits_BW: torch.Tensor) -> torch.Tensor:
        """See `Comparison`."""
        return self._columns(logits_BW, self.teacher_W)

    def student_class(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The first column: nothing is learned from the column of a token."""
        return torch.zeros_like(ids_B)

    def unfolded(
        self, gradient_BK: torch.Tensor, folded_BK: torch.Tensor, logits_BV: torch.Tensor
    ) -> torch.Tensor:
        """See `Comparison`."""
        del folded_BK
        others = self.student_V[self.matched :]
        order_BV = logits_BV[:, others].argsort(-1, descending=True)
        columns = len(self.student_V)
        unfolded_BV = torch.empty_like(logits_BV)
        unfolded_BV[:, self.student_V[: self.matched]] = gradient_BK[:, : self.matched]
        return unfolded_BV.scatter_(-1, others[order_BV], gradient_BK[:, self.matched : columns])

    def _columns(self, logits_BV: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
        own_BV = logits_BV[:, ids_V]
        ranked_BV = own_BV[:, self.matched :].sort(-1, descending=True).values
        lacking = max(self.sizes) - len(ids_V)
        # The smallest probability that there is, so that logarithms stay finite.
        floor_B1 = own_BV.amax(-1, keepdim=True) + math.log(torch.finfo(own_BV.dtype).tiny)
        return torch.cat([own_BV[:, : self.matched], ranked_BV, floor_B1.expand(-1, lacking)], -1)


def matched_ranks(
    shared_O2: torch.Tensor | None, sizes: tuple[int, int], device: torch.device
) -> MatchedRanks:
    """The columns of two vocabularies of these `sizes`, with the ids of the tokens that both have
    (None: all, of one vocabulary).
    """
    sides = []
    for side, size in enumerate(sizes):
        matched_O = torch.arange(size) if shared_O2 is None else shared_O2[:, side]
        is_other_V = torch.ones(size, dtype=torch.bool)
        is_other_V[matched_O] = False
        sides.append(torch.cat([matched_O, is_other_V.nonzero().squeeze(-1)]).to(device))
    count = sizes[0] if shared_O2 is None else len(shared_O2)
    return MatchedRanks(student_V=sides[0], teacher_W=sides[1], matched=count)


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
    columns: MatchedRanks,
    divergence: HybridDivergence,
    logits_bytes: int,
) -> torch.Tensor:
    """The derivative of the divergence by the logarithm of the student's mass, [B], a chunk of
    logits at a time.
    """
    dtype = accumulation_dtype(hidden_BH)
    own, other = LogitProducer(head, dtype), LogitProducer(teacher_head, dtype)
    over, found = WholeVocabulary(), [hidden_BH.new_zeros(0, dtype=dtype)]
    for rows in _chunks(len(hidden_BH), max(columns.sizes), logits_bytes, dtype):
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


def _chunks(
    num_rows: int, vocabulary: int, logits_bytes: int, dtype: torch.dtype
) -> Iterator[slice]:
    size = max(1, logits_bytes // (2 * vocabulary * dtype.itemsize))
    for begin in range(0, num_rows, size):
        yield slice(begin, min(begin + size, num_rows))
