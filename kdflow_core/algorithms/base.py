"""What an algorithm is: from whom the student learns, on which tokens, with which weights.

Dimensions: B sequences, T tokens, N supervised tokens of the micro-batch, K those of one teacher,
H and G hidden sizes of student and teacher, O tokens that two vocabularies share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from kdflow_core.contracts import HiddenSignal, OutputHead, Signal
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import Comparison
from kdflow_core.losses.span_likelihood import Spans
from kdflow_core.metrics import TAUGHT_TERMS
from kdflow_core.models.forward import post_norm_states, routed_states
from kdflow_core.models.packing import PackedRows
from kdflow_core.models.routing import Routing, balance
from kdflow_core.uploads import upload


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Ids [B, T], padded, or of `packed` rows in one; for each supervised token the row and
    position of the state that predicts it, [N]; and what is no padding (None: all), in host memory.
    """

    ids_BT: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    packed: PackedRows | None = None
    is_token_BT: torch.Tensor | None = None

    def states_of(self, model: PreTrainedModel) -> torch.Tensor:
        """The model's last hidden states that predict the supervised tokens, [N, H]."""
        hidden_BTH = post_norm_states(model.base_model, self.ids_BT, self.packed)
        states_NH: torch.Tensor = hidden_BTH[self.row_N, self.position_N]
        return states_NH

    def balanced_states_of(
        self, model: PreTrainedModel, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those states of a mixture of experts, and how even its routing of all tokens is."""
        hidden_BTH, logits = routed_states(model.base_model, self.ids_BT, self.packed)
        if self.is_token_BT is not None:
            tokens = self.is_token_BT.flatten().nonzero().squeeze(-1)
            tokens_S = upload(tokens, hidden_BTH.device)
            logits = tuple(layer_SE[tokens_S] for layer_SE in logits)
        return hidden_BTH[self.row_N, self.position_N], balance(logits, routing)


@dataclass(frozen=True, kw_only=True)
class TokenSignal:
    """What one teacher says of the tokens `index_K` of the micro-batch, and of runs of tokens. The
    tokens of the examples that it teaches are these and `rest_R`, of which it says nothing. A
    teacher without a head speaks of runs alone, and has all tokens for `index_K`.
    """

    index_K: torch.Tensor
    rest_R: torch.Tensor
    signal: Signal | None
    spans: Spans | None = None


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The student's tokens, their ids [N] and the weight of each in the loss; what teachers say, in
    the order of the algorithm's teachers; the teacher's tokens where the algorithm reads them;
    the log-probabilities [N] that the tokens were sampled with, if they were; and their advantages
    [N] where a reward is learned. `extra_ce_N` is a further weight of cross-entropy, in the
    gradient alone.
    """

    student: TokenBatch
    target_ids_N: torch.Tensor
    weight: float
    signals: tuple[TokenSignal, ...]
    teacher_tokens: TokenBatch | None
    sampled_log_prob_N: torch.Tensor | None
    advantage_N: torch.Tensor | None
    extra_ce_N: torch.Tensor | None = None

    def at(self, index_K: torch.Tensor) -> "MicroBatch":
        """The tokens of some rows, without signals."""
        sampled_N, advantage_N = self.sampled_log_prob_N, self.advantage_N
        extra_N = self.extra_ce_N
        return replace(
            self,
            target_ids_N=self.target_ids_N[index_K],
            signals=(),
            sampled_log_prob_N=None if sampled_N is None else sampled_N[index_K],
            advantage_N=None if advantage_N is None else advantage_N[index_K],
            extra_ce_N=None if extra_N is None else extra_N[index_K],
        )

    @property
    def weights_N(self) -> torch.Tensor:
        """The weight of every token, [N]."""
        return torch.full_like(self.target_ids_N, self.weight, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher as an algorithm has it: its output head (None: it is asked for the likelihood of
    spans alone, which is at hand); the view that it reads; the weight of its divergence; the data
    sources whose examples it teaches (None: all of them); and whether it is asked for spans.
    """

    head: OutputHead | None
    view: str = "teacher"
    weight: float = 1.0
    sources: frozenset[str] | None = None
    reads_spans: bool = False

    @property
    def states_head(self) -> OutputHead:
        """The head of a teacher whose states are read."""
        assert self.head is not None
        return self.head


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What algorithms are made of: the loss, the student, and by name the heads of the teachers
    whose states are read. Of teachers that read otherwise than the run's own, also their view, and
    what compares their vocabulary with the student's (None: both have one). `first_head` reads the
    head that the student begins with, whole, from its checkpoint; `shared_O2` finds the ids [O, 2]
    that the tokens of two vocabularies have in the student's and in the teacher's (None: both have
    one).
    """

    spec: LossSpec
    model: PreTrainedModel
    heads: Mapping[str, OutputHead]
    vocabulary_size: int
    views: Mapping[str, str] = field(default_factory=dict)
    foldings: Mapping[str, Comparison | None] = field(default_factory=dict)
    first_head: Callable[[], OutputHead] | None = None
    shared_O2: Callable[[], torch.Tensor | None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student, its states [N, H] of the micro-batch's tokens, and its head (which may be this
    rank's part of it).
    """

    model: PreTrainedModel
    hidden_NH: torch.Tensor
    head: OutputHead

    def at(self, index_K: torch.Tensor) -> "Student":
        """The same, of some rows."""
        return replace(self, hidden_NH=self.hidden_NH[index_K])


class Algorithm(torch.nn.Module, ABC):
    """A module, so that weights of its own are sharded and checkpointed with the student's."""

    reads_teacher_tokens: ClassVar[bool] = False

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The teachers whose signals a micro-batch brings, in this order."""
        return ()

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """Models of its own, to be sharded like the student."""
        return ()

    @property
    def lr(self) -> float | None:
        """The learning rate of weights of its own; None: the student's."""
        return None

    @abstractmethod
    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """The weighted loss of a micro-batch.

        It runs inside the forward of the module that FSDP gathers.
        """

    def after_step(self, model: PreTrainedModel) -> None:
        """Called after each optimizer step with the student."""
        del model


def taught_loss(
    student: Student, batch: MicroBatch, *, taught: TokenSignal, spec: LossSpec
) -> LossOutput:
    """The loss of the tokens of the examples that a teacher teaches. Those of which it says nothing
    have their part of cross-entropy, and stand behind the others in the terms.
    """
    if len(taught.index_K) == len(batch.target_ids_N):
        return whole_batch_loss(student, batch, teacher=taught.signal, spec=spec)
    index_K, rest_R = taught.index_K, taught.rest_R
    with_teacher = whole_batch_loss(
        student.at(index_K), batch.at(index_K), teacher=taught.signal, spec=spec
    )
    if not len(rest_R):
        return with_teacher
    alone = replace(spec, divergence=None, span_share=0.0, token_weight=None, folding=None)
    without = whole_batch_loss(student.at(rest_R), batch.at(rest_R), teacher=None, spec=alone)
    terms = {
        name: values_K if name in TAUGHT_TERMS else torch.cat([values_K, without.terms[name]])
        for name, values_K in with_teacher.terms.items()
    }
    return LossOutput(with_teacher.loss + without.loss, terms)


def whole_batch_loss(
    student: Student, batch: MicroBatch, *, teacher: Signal | None, spec: LossSpec
) -> LossOutput:
    """The loss of all tokens of a micro-batch, from a teacher's hidden states or without one."""
    assert teacher is None or isinstance(teacher, HiddenSignal)  # the config refuses others
    return distillation_loss(
        student_hidden_TH=student.hidden_NH,
        student_head=student.head,
        teacher=teacher,
        target_ids_T=batch.target_ids_N,
        weights_T=batch.weights_N,
        sampled_log_prob_T=batch.sampled_log_prob_N,
        advantage_T=batch.advantage_N,
        extra_ce_T=batch.extra_ce_N,
        spec=spec,
    )
