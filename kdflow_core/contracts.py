"""Records and protocols that the parts of the core, and the layers around it, agree on.

Dimensions: N supervised tokens (rows) of a sequence, T tokens, H hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

MEDIA_DIGEST_BYTES = 16


def sequence_digest(
    ids_T: np.ndarray, supervised_T: np.ndarray, media: Sequence[bytes] = ()
) -> bytes:
    """16 bytes (BLAKE2b) over all that a model reads: a sequence's token ids and supervision mask,
    and the digests of the pictures or other media that stand in it, in their order.

    It ties teacher states to the sequence they were computed from.
    """
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(len(ids_T).to_bytes(8, "little"))
    hasher.update(np.ascontiguousarray(ids_T, dtype="<i4").tobytes())
    hasher.update(np.packbits(np.ascontiguousarray(supervised_T, dtype=bool)).tobytes())
    for own in media:
        if len(own) != MEDIA_DIGEST_BYTES:
            raise ValueError(f"a media digest has {MEDIA_DIGEST_BYTES} bytes, this one {len(own)}")
        hasher.update(own)
    return hasher.digest()


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids [T] and a mask [T] that is true where the *token* is supervised.

    A supervised token at position i is predicted by the state at position i-1, so position 0 is
    never supervised. `media` are the digests of what else the model reads at places of the text.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    media: tuple[bytes, ...] = ()

    @property
    def target_positions_N(self) -> np.ndarray:
        """Positions of the supervised tokens."""
        return np.flatnonzero(self.supervised_T)

    @property
    def target_ids_N(self) -> np.ndarray:
        """The supervised tokens, as int32."""
        return np.asarray(self.ids_T[self.supervised_T], dtype=np.int32)

    @property
    def prompt_ids_T(self) -> np.ndarray:
        """The tokens before the first supervised one; all, where there is none."""
        positions_N = self.target_positions_N
        return self.ids_T[: int(positions_N[0])] if len(positions_N) else self.ids_T

    @property
    def context_ids_T(self) -> np.ndarray:
        """The tokens before the last run of supervised ones; all, where there is none: a prompt."""
        positions_N = self.target_positions_N
        if not len(positions_N):
            return self.ids_T
        breaks = np.flatnonzero(np.diff(positions_N) > 1)
        begin = positions_N[breaks[-1] + 1] if len(breaks) else positions_N[0]
        return self.ids_T[: int(begin)]

    @property
    def digest(self) -> bytes:
        """See `sequence_digest`."""
        return sequence_digest(self.ids_T, self.supervised_T, self.media)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a teacher's view of a sample stands to the student's, where their tokens differ.

    `pairs_P2` are rows of both (student, teacher) that condition on the same bytes; `spans_S4` the
    shortest runs of tokens that spell the same bytes: begin and end in the student's view, begin
    and end in the teacher's. Both are int32.
    """

    pairs_P2: np.ndarray
    spans_S4: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation as each model reads it, and its label, the gold answer, where there is one.

    `views` are by the name of who reads: `student`, `teacher`, and other teachers that read another
    tokenization or template. Between the student's view and a teacher's may stand an alignment;
    without one, they supervise the same tokens.

    Where the student has sampled the answer, `sampled_log_prob_N` are the log-probabilities that
    the supervised tokens had then, in nats, and `advantage` what a reward makes of the answer.
    """

    source: str
    views: Mapping[str, TokenSequence]
    alignments: Mapping[str, Alignment] = field(default_factory=dict)
    label: str | None = None
    sampled_log_prob_N: np.ndarray | None = None
    advantage: float = 0.0

    @property
    def student(self) -> TokenSequence:
        """As the student reads it."""
        return self.views["student"]

    @property
    def teacher(self) -> TokenSequence:
        """As the run's own teacher reads it."""
        return self.views["teacher"]


class Examples(Protocol):
    """Random access to the examples of one split, with their lengths known up front."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...
    def lengths(self, view: str) -> np.ndarray:
        """Tokens per example, in one of its views."""
        ...

    def supervised_counts(self, view: str) -> np.ndarray:
        """Supervised tokens per example."""
        ...


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """What turns post-norm hidden states into logits: softcap(scale * (h W^T + b)).

    `weight_VH` has only the rows of the true vocabulary; padded rows are left out, so they carry
    no probability. Where they are the first rows of a parameter that is learned, that is the
    `parameter`, and has the gradient: a view's would be made, and copied, for every micro-batch.
    """

    weight_VH: torch.Tensor
    parameter: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class HiddenRows:
    """The states of a sequence's supervised tokens: the rows `index_N` of `buffer_RH`.

    The buffer is bfloat16 and may be an engine's whole output, with the rows of many sequences. It
    is handed on by reference; nothing but the rows selected from it is ever copied.
    """

    buffer_RH: torch.Tensor
    index_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TopKRows:
    """The log-probabilities [N, K] (nats) of the K most probable tokens `ids_NK` at a sequence's
    supervised tokens, and the logarithm of the mass that all others share.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    log_tail_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """The log-probabilities [N] (nats) of a sequence's supervised tokens themselves."""

    log_prob_N: torch.Tensor


# What a teacher says of one sequence; a teacher that says nothing has no source of them.
SignalRows = HiddenRows | TopKRows | TargetRows


class HiddenSignal(NamedTuple):
    """The teacher's states of some tokens [T, G], and its head."""

    hidden_TG: torch.Tensor
    head: OutputHead


class TopKSignal(NamedTuple):
    """See `TopKRows`, of some tokens."""

    ids_TK: torch.Tensor
    log_probs_TK: torch.Tensor
    log_tail_T: torch.Tensor


# What a teacher says of the tokens of a batch.
Signal = HiddenSignal | TopKSignal


class SignalSource(Protocol):
    """What a teacher says, by sequence."""

    @property
    def hidden_size(self) -> int:
        """H, of every row of states; 0 where there are none."""
        ...

    def begin_step(self, step: int) -> None:
        """Get ready for an optimizer step (counted from 0). Every rank calls it for every step."""
        ...

    def rows(self, sequence: TokenSequence) -> SignalRows:
        """What the teacher says of the sequence's supervised tokens.

        Raises when there is nothing, or when it belongs to other tokens.
        """
        ...


Source = TypeVar("Source", bound=SignalSource, covariant=True)


class TeacherAtHand(NamedTuple, Generic[Source]):
    """A teacher whose signals are at hand, the head that they were made for, and the view of the
    samples that it reads.
    """

    signals: Source
    head: OutputHead
    view: str = "teacher"


class TeacherEngine(Protocol):
    """Computes post-norm hidden states.

    An engine may be spread over several ranks; these call each method together, with the same
    arguments.
    """

    @property
    def max_length(self) -> int:
        """The longest sequence it takes, in tokens."""
        ...

    @property
    def remark(self) -> str:
        """What a user should be told once about how it runs; usually nothing."""
        ...

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences, grouped into batches for `forward`."""
        ...

    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        """One batch; the states stay on the engine's device.

        Raises ModelError when the engine is closed or the model cannot run the batch.
        """
        ...

    def sleep(self) -> None:
        """Move the weights to host memory. May be called twice."""
        ...

    def wake(self) -> None:
        """Bring the weights back to the device. May be called when awake."""
        ...

    def close(self) -> None:
        """Free the model. May be called twice."""
        ...
