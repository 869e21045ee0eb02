"""How far a model's next-token distributions are from the teacher's, on held-out tokens.

Dimensions: N supervised tokens of a sequence, C tokens of a chunk, H and G hidden sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from kdflow_core.batching import (
    batch_by_tokens,
    hidden_rows,
    pad_right,
    select_rows,
    taught_tokens,
    teacher_rows,
)
from kdflow_core.contracts import (
    Example,
    Examples,
    OutputHead,
    SignalSource,
    TeacherAtHand,
    TokenSequence,
)
from kdflow_core.eval.sample_sums import COLUMNS, COMPARED, SUMS, SampleSums
from kdflow_core.losses.base import Distributions
from kdflow_core.losses.folding import Comparison
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.losses.logits import LogitProducer
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.losses.vocabulary import WholeVocabulary
from kdflow_core.models.families.base import batched_length
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.heads import live_head
from kdflow_core.sinks import Reporter

CHUNK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """What scoring needs where student and teacher have two tokenizers: both vocabularies folded
    (None where they are the same); and of each id of the model that is scored, its bytes, and
    whether the other side has the token too, or it is an end.
    """

    folding: Comparison | None
    length_V: np.ndarray
    is_shared_V: np.ndarray


class _Scored(NamedTuple):
    """The model that is scored: its logits, the ids that end its turns, the classes in which it is
    compared, and which of its tokens [V] the other side has too.
    """

    producer: LogitProducer
    end_ids: torch.Tensor
    folding: Comparison | None
    is_shared_V: torch.Tensor | None


class _Rows(NamedTuple):
    """A sequence's states [N, H] and targets [N]; the rows [P] that are compared with the teacher,
    and its states [P, G] there.
    """

    hidden_NH: torch.Tensor
    targets_N: torch.Tensor
    compared_P: torch.Tensor
    teacher_PG: torch.Tensor


class Judged(Protocol):
    """What is scored: its output head, and its states at the supervised tokens. `longest` is as
    `batched_length` has it.
    """

    @property
    def head(self) -> OutputHead:
        """Over the true vocabulary."""
        ...

    @property
    def longest(self) -> int | None:
        """The longest sequences that may be a batch with others."""
        ...

    def states(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """The states [N, H] that predict the supervised tokens of some sequences."""
        ...


class ModelAtHand:
    """A model that is loaded."""

    def __init__(self, model: PreTrainedModel, vocabulary_size: int) -> None:
        self._model = model
        self.head = live_head(model, vocabulary_size)
        self.longest = batched_length(model.config.get_text_config().to_dict())

    def states(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """See `Judged`."""
        ids_BT = pad_right([s.ids_T for s in sequences]).to(self._model.device)
        hidden_BTH = post_norm_states(self._model.base_model, ids_BT)
        positions = [torch.from_numpy(s.target_positions_N - 1) for s in sequences]
        return [hidden_BTH[row, positions_N] for row, positions_N in enumerate(positions)]


class StatesAtHand:
    """A teacher of which only the stored states are at hand."""

    longest = None

    def __init__(self, teacher: TeacherAtHand[SignalSource]) -> None:
        self.head = teacher.head
        self._signals = teacher.signals

    def states(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """See `Judged`."""
        device, size = self.head.weight_VH.device, self._signals.hidden_size
        rows = [hidden_rows(self._signals.rows(sequence)) for sequence in sequences]
        return [select_rows([own], hidden_size=size, device=device) for own in rows]


@torch.inference_mode()
def score_distributions(
    *,
    judged: Judged,
    examples: Examples,
    teachers: Mapping[str, TeacherAtHand[SignalSource]],
    tokens_per_batch: int,
    reporter: Reporter,
    title: str,
    side: Literal["student", "teacher"],
    end_ids: Sequence[int],
    aligned: Mapping[str, Aligned],
) -> SampleSums:
    """What scores are made of, of each sample; what is judged reads the sequences of its `side`,
    and ends its turns by `end_ids`. `teachers` are by the data source that they teach; the one
    named `all` teaches the rest. `aligned` are those views of theirs that have other tokens than
    the student. The run's own teacher is compared with itself, and is left out where another view's
    teacher teaches.
    """
    producer = LogitProducer(judged.head, torch.float32)
    ends = torch.tensor(end_ids, dtype=torch.long, device=judged.head.weight_VH.device)
    views = {teacher.view for teacher in teachers.values()}
    scored = {
        view: _scored(producer, ends, aligned.get(view), compares=side == "student")
        for view in views
    }
    length_V = next((own.length_V for own in aligned.values()), None)
    teaching = {n: LogitProducer(t.head, torch.float32) for n, t in teachers.items()}
    sums, sources, digests = [np.zeros((0, len(SUMS)))], [], [np.zeros((0, 16), np.uint8)]
    done = 0
    for batch in batch_by_tokens(examples.lengths(side), tokens_per_batch, judged.longest):
        chosen = [examples[i] for i in batch]
        if side == "teacher":
            chosen = [e for e in chosen if teachers[_teacher_of(e, teachers)].view == side]
        if not chosen:
            continue
        sequences = [example.views[side] for example in chosen]
        states = judged.states(sequences)
        for example, sequence, hidden_NH in zip(chosen, sequences, states, strict=True):
            name = _teacher_of(example, teachers)
            teacher = teachers[name]
            rows = _rows(hidden_NH, example, side, teacher)
            terms = _token_sums(rows, scored[teacher.view], teaching[name])
            size = 0 if length_V is None else int(length_V[sequence.target_ids_N].sum())
            num_ends = int(torch.isin(rows.targets_N, ends).sum())
            counts = [len(rows.compared_P), len(rows.targets_N), size, num_ends]
            sums.append(np.array([[*terms, *counts]]))
            sources.append(example.source)
            digests.append(np.frombuffer(example.student.digest, np.uint8)[None])
        done += len(batch)
        reporter.progress(done=done, total=len(examples), unit="sequences", detail=title)
    return SampleSums(
        digests_S16=np.concatenate(digests), sources=sources, sums_SC=np.concatenate(sums)
    )


def _teacher_of(example: Example, teachers: Mapping[str, TeacherAtHand[SignalSource]]) -> str:
    """The name of an example's teacher."""
    return example.source if example.source in teachers else "all"


def _scored(
    producer: LogitProducer, end_ids: torch.Tensor, aligned: Aligned | None, *, compares: bool
) -> _Scored:
    """The model, as it is compared with the teacher of a view."""
    if aligned is None:
        return _Scored(producer, end_ids, folding=None, is_shared_V=None)
    return _Scored(
        producer,
        end_ids,
        folding=aligned.folding if compares else None,
        is_shared_V=torch.from_numpy(aligned.is_shared_V).to(end_ids.device),
    )


def _rows(
    hidden_NH: torch.Tensor,
    example: Example,
    side: Literal["student", "teacher"],
    teacher: TeacherAtHand[SignalSource],
) -> _Rows:
    """A sequence's rows. The teacher is compared with itself at all of its own."""
    sequence, device, signals = example.views[side], hidden_NH.device, teacher.signals
    if side == "student":
        compared = taught_tokens(example, teacher.view)
        theirs = teacher_rows(example, signals, teacher.view)
    else:
        compared = np.arange(len(hidden_NH))
        theirs = hidden_rows(signals.rows(example.teacher))
    return _Rows(
        hidden_NH=hidden_NH,
        targets_N=torch.from_numpy(sequence.target_ids_N).long().to(device),
        compared_P=torch.from_numpy(compared).to(device),
        teacher_PG=select_rows([theirs], hidden_size=signals.hidden_size, device=device),
    )


def _token_sums(rows: _Rows, scored: _Scored, teacher: LogitProducer) -> list[float]:
    total = torch.zeros(len(COLUMNS), dtype=torch.float64)
    for begin in range(0, len(rows.compared_P), CHUNK_TOKENS):
        part = slice(begin, begin + CHUNK_TOKENS)
        at_C = rows.compared_P[part]
        student_CV = scored.producer.logits(rows.hidden_NH[at_C])
        teacher_CV = teacher.logits(rows.teacher_PG[part])
        columns = _compared(student_CV, teacher_CV, rows.targets_N[at_C], scored)
        total[: len(COMPARED)] += torch.stack([c.double().sum().cpu() for c in columns])
    alone = torch.ones_like(rows.targets_N, dtype=torch.bool)
    alone[rows.compared_P] = False
    for at_C in torch.split(alone.nonzero().squeeze(-1), CHUNK_TOKENS):
        log_q_CV = torch.log_softmax(scored.producer.logits(rows.hidden_NH[at_C]), -1)
        ce_C = -log_q_CV.gather(-1, rows.targets_N[at_C].unsqueeze(-1))
        total[COLUMNS.index("ce_model")] += ce_C.double().sum().cpu()
    is_end_N = torch.isin(rows.targets_N, scored.end_ids)
    for hidden_CH in torch.split(rows.hidden_NH[is_end_N], CHUNK_TOKENS):
        top_C = scored.producer.logits(hidden_CH).argmax(-1)
        total[COLUMNS.index("ends_right")] += torch.isin(top_C, scored.end_ids).sum().cpu()
    return [float(value) for value in total]


def _compared(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    targets_C: torch.Tensor,
    scored: _Scored,
) -> tuple[torch.Tensor, ...]:
    """The columns `COMPARED` of some tokens."""
    over, folding, target_C1 = WholeVocabulary(), scored.folding, targets_C.unsqueeze(-1)
    log_q_CV, q_CV = over.distribution(student_CV)
    ce_model_C1 = -log_q_CV.gather(-1, target_C1)
    shared_C = torch.ones_like(ce_model_C1)
    if scored.is_shared_V is not None:
        shared_C = q_CV[:, scored.is_shared_V].sum(-1)
    if folding is not None:
        student_CV, teacher_CV = folding.student(student_CV), folding.teacher(teacher_CV)
        log_q_CV, q_CV = over.distribution(student_CV)
        target_C1 = folding.student_class(targets_C).unsqueeze(-1)
    log_p_CV, p_CV = over.distribution(teacher_CV)
    d = Distributions(log_q_CV, q_CV, log_p_CV, p_CV, over, target_C1.squeeze(-1), None)
    return (
        ForwardKL().value_and_gradient(d)[0],
        ReverseKL().value_and_gradient(d)[0],
        over.top1(student_CV) == over.top1(teacher_CV),
        ce_model_C1,
        -log_p_CV.gather(-1, target_C1),
        shared_C,
    )


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
