"""Records and protocols that the parts of the core, and the layers around it, agree on.

Dimensions: N supervised tokens (rows) of a sequence, T tokens, H hidden size, V vocabulary,
R rank of a low-rank update.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


def sequence_digest(ids_T: np.ndarray, supervised_T: np.ndarray) -> bytes:
    """16 bytes (BLAKE2b) over a sequence's token ids and supervision mask.

    It ties teacher states to the sequence they were computed from.
    """
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(len(ids_T).to_bytes(8, "little"))
    hasher.update(np.ascontiguousarray(ids_T, dtype="<i4").tobytes())
    hasher.update(np.packbits(np.ascontiguousarray(supervised_T, dtype=bool)).tobytes())
    return hasher.digest()


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids [T] and a mask [T] that is true where the *token* is supervised.

    A supervised token at position i is predicted by the state at position i-1, so position 0 is
    never supervised.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray

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
        return sequence_digest(self.ids_T, self.supervised_T)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation as both models see it, and its gold answer where there is one.

    Where the student has sampled the answer, `sampled_log_prob_N` are the log-probabilities that
    the supervised tokens had then, in nats, and `advantage` what a reward makes of the answer.
    """

    source: str
    student: TokenSequence
    teacher: TokenSequence
    answer: str | None = None
    sampled_log_prob_N: np.ndarray | None = None
    advantage: float = 0.0


class Examples(Protocol):
    """Random access to the examples of one split, with their lengths known up front."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...
    def lengths(self, side: str) -> np.ndarray:
        """Tokens per example, `side` being student or teacher."""
        ...

    def supervised_counts(self, side: str) -> np.ndarray:
        """Supervised tokens per example."""
        ...


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """What LoRA (arXiv 2106.09685, equation 3) adds to a weight: scale * B A."""

    a_RH: torch.Tensor
    b_VR: torch.Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """What turns post-norm hidden states into logits: softcap(scale * (h W^T + b)), where W may
    have a low-rank update.

    `weight_VH` has only the rows of the true vocabulary; padded rows are left out, so they carry
    no probability.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    lora: LowRankUpdate | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """The states of a sequence's supervised tokens: the rows `index_N` of `buffer_RH`.

    The buffer is bfloat16 and may be an engine's whole output, with the rows of many sequences. It
    is handed on by reference; nothing but the rows selected from it is ever copied.
    """

    buffer_RH: torch.Tensor
    index_N: torch.Tensor


class HiddenStateSource(Protocol):
    """Teacher states by sequence."""

    @property
    def hidden_size(self) -> int:
        """H, of every row."""
        ...

    def begin_step(self, step: int) -> None:
        """Get ready for an optimizer step (counted from 0). Every rank calls it for every step."""
        ...

    def rows(self, sequence: TokenSequence) -> TeacherRows:
        """The states that predict the sequence's supervised tokens.

        Raises when there are none, or when they belong to other tokens.
        """
        ...


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
        """What a user should be told once about how it runs; mostly nothing."""
        ...

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences, grouped into batches for `forward`."""
        ...

    def forward(self, sequences: Sequence[TokenSequence]) -> list[TeacherRows]:
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


class Reporter(Protocol):
    """Where progress and messages of a running stage go."""

    def progress(self, *, done: int, total: int, unit: str, detail: str = "") -> None:
        """Say how far the stage is; the receiver derives rate and time left."""
        ...

    def message(self, text: str) -> None:
        """One line for the log."""
        ...


class MetricsSink(Protocol):
    """Receives one record of scalars per optimizer step."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one step's record."""
        ...
