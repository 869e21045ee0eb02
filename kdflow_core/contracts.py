"""Records and protocols that the parts of the core, and the layers around it, agree on.

Dimensions: N supervised tokens (rows) of a sequence, T tokens, H hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Iterator
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
        """The tokens before the first supervised one."""
        return self.ids_T[: int(self.target_positions_N[0])]

    @property
    def digest(self) -> bytes:
        """See `sequence_digest`."""
        return sequence_digest(self.ids_T, self.supervised_T)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation as both models see it, and its gold answer where there is one."""

    source: str
    student: TokenSequence
    teacher: TokenSequence
    answer: str | None = None


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
class OutputHead:
    """What turns post-norm hidden states into logits: softcap(scale * (h W^T + b)).

    `weight_VH` has only the rows of the true vocabulary; padded rows are left out, so they carry
    no probability.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class HiddenStateSource(Protocol):
    """Teacher states by sequence."""

    def rows_NH(self, sequence: TokenSequence) -> torch.Tensor:
        """The bfloat16 states [N, H] that predict the sequence's supervised tokens.

        Raises when there are none, or when they belong to other tokens.
        """
        ...


class TeacherEngine(Protocol):
    """Computes post-norm hidden states."""

    def hidden_states(self, sequences: Iterable[TokenSequence]) -> Iterator[torch.Tensor]:
        """One bfloat16 tensor [N, H] per sequence, in order, on the CPU."""
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
