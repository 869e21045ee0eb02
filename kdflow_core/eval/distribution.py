"""How far a model's next-token distributions are from the teacher's, on held-out tokens.

Dimensions: N supervised tokens of a sequence, C tokens of a chunk, H and G hidden sizes.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from kdflow_core.batching import batch_by_tokens, hidden_rows, pad_right, select_rows, teacher_rows
from kdflow_core.contracts import Examples, SignalSource, TeacherAtHand, TokenSequence
from kdflow_core.losses.base import Distributions
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.losses.logits import LogitProducer
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.losses.vocabulary import WholeVocabulary
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.heads import live_head
from kdflow_core.sinks import Reporter

CHUNK_TOKENS = 256
COLUMNS = ("forward_kl", "reverse_kl", "agreement", "ce_model", "ce_teacher")


@dataclass(frozen=True, kw_only=True)
class DistributionScores:
    """Means over supervised tokens. KL in nats per token; agreement is the share of tokens with
    the teacher's top-1; perplexities are of the text itself.
    """

    num_tokens: int
    forward_kl: float
    reverse_kl: float
    agreement: float
    perplexity: float
    teacher_perplexity: float


@torch.inference_mode()
def score_distributions(
    *,
    model: PreTrainedModel,
    examples: Examples,
    teachers: Mapping[str, TeacherAtHand[SignalSource]],
    tokens_per_batch: int,
    reporter: Reporter,
    title: str,
    side: Literal["student", "teacher"],
) -> dict[str, DistributionScores]:
    """Scores by source, and over all under the name `all`; the model reads the sequences of its
    `side`. `teachers` are by the data source that they teach; the one named `all` teaches the rest.
    """
    size = teachers["all"].head.weight_VH.shape[0]
    producer = LogitProducer(live_head(model, size), torch.float32)
    teaching = {n: LogitProducer(t.head, torch.float32) for n, t in teachers.items()}
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(COLUMNS) + 1))
    done = 0
    for batch in batch_by_tokens(examples.lengths(side), tokens_per_batch):
        chosen = [examples[i] for i in batch]
        sequences = [e.student if side == "student" else e.teacher for e in chosen]
        ids_BT = pad_right([s.ids_T for s in sequences]).to(model.device)
        hidden_BTH = post_norm_states(model.base_model, ids_BT)
        for row, (example, sequence) in enumerate(zip(chosen, sequences, strict=True)):
            positions_N = torch.from_numpy(sequence.target_positions_N - 1)
            name = example.source if example.source in teachers else "all"
            states = teachers[name].signals
            teacher_NG = select_rows(
                [teacher_rows(example, states)],
                hidden_size=states.hidden_size,
                device=model.device,
            )
            targets_N = torch.from_numpy(sequence.target_ids_N).long().to(model.device)
            terms = _token_sums(
                hidden_BTH[row, positions_N], teacher_NG, targets_N, (producer, teaching[name])
            )
            for name in ("all", example.source):
                sums[name] += [*terms, len(positions_N)]
        done += len(batch)
        reporter.progress(done=done, total=len(examples), unit="sequences", detail=title)
    return {name: _scores(total) for name, total in sums.items()}


def _token_sums(
    hidden_NH: torch.Tensor,
    teacher_NG: torch.Tensor,
    targets_N: torch.Tensor,
    producers: tuple[LogitProducer, LogitProducer],
) -> list[float]:
    total, over = torch.zeros(len(COLUMNS), dtype=torch.float64), WholeVocabulary()
    for begin in range(0, len(targets_N), CHUNK_TOKENS):
        rows = slice(begin, begin + CHUNK_TOKENS)
        student_CV = producers[0].logits(hidden_NH[rows])
        teacher_CV = producers[1].logits(teacher_NG[rows])
        log_q_CV = torch.log_softmax(student_CV, -1)
        log_p_CV = torch.log_softmax(teacher_CV, -1)
        targets_C = targets_N[rows]
        target_C1 = targets_C.unsqueeze(-1)
        d = Distributions(
            log_q_CV,
            log_q_CV.exp(),
            log_p_CV,
            log_p_CV.exp(),
            over,
            targets_C,
            None,
        )
        columns = (
            ForwardKL().value_and_gradient(d)[0],
            ReverseKL().value_and_gradient(d)[0],
            over.top1(student_CV) == over.top1(teacher_CV),
            -log_q_CV.gather(-1, target_C1),
            -log_p_CV.gather(-1, target_C1),
        )
        total += torch.stack([column.double().sum().cpu() for column in columns])
    return [float(value) for value in total]


def _scores(total: np.ndarray) -> DistributionScores:
    count = int(total[-1])
    forward_kl, reverse_kl, agreement, ce_model, ce_teacher = total[:-1] / count
    return DistributionScores(
        num_tokens=count,
        forward_kl=float(forward_kl),
        reverse_kl=float(reverse_kl),
        agreement=float(agreement),
        perplexity=_perplexity(ce_model),
        teacher_perplexity=_perplexity(ce_teacher),
    )


def _perplexity(cross_entropy: float) -> float:
    """The perplexity of a mean cross-entropy in nats; infinite beyond what a float holds."""
    return math.exp(cross_entropy) if cross_entropy < math.log(sys.float_info.max) else math.inf


@torch.inference_mode()
def state_difference(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], states: SignalSource
) -> float:
    """How far the states of a model are from stored ones: the median over the supervised rows of
    |own - stored| / |stored|. Rounding makes about 0.01, other weights about 1.
    """
    differences = []
    for sequence in sequences:
        ids_BT = torch.from_numpy(sequence.ids_T.astype(np.int64))[None].to(model.device)
        own_BTH = post_norm_states(model.base_model, ids_BT)
        own_NH = own_BTH[0, torch.from_numpy(sequence.target_positions_N - 1)].float().cpu()
        rows = hidden_rows(states.rows(sequence))
        stored_NH = rows.buffer_RH[rows.index_N].float().cpu()
        differences.append(relative_difference(own_NH, stored_NH))
    return float(torch.cat(differences).median())


def relative_difference(own_NH: torch.Tensor, other_NH: torch.Tensor) -> torch.Tensor:
    """|own - other| / |other| of each row, [N]."""
    norm = torch.linalg.vector_norm
    difference_N: torch.Tensor = norm(own_NH - other_NH, dim=-1)
    size_N: torch.Tensor = norm(other_NH, dim=-1).clamp_min(1e-12)
    return difference_N / size_N
