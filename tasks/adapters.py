"""The store's files as the protocols of the core.

Dimensions: N rows of a sequence, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdflow_core.contracts import (
    Example,
    Examples,
    HiddenStateSource,
    TeacherRows,
    TokenSequence,
)
from storage.errors import RowsMismatchError
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable


def _sequence(row: Mapping[str, Any], side: str) -> TokenSequence:
    """One side of a token row."""
    return TokenSequence(
        ids_T=row[f"{side}_ids"], supervised_T=row[f"{side}_supervised"].astype(bool)
    )


class TokenExamples:
    """A token table as `Examples`."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        row = self._table[index]
        return Example(
            source=row["source"],
            student=_sequence(row, "student"),
            teacher=_sequence(row, "teacher"),
            answer=row["answer"],
            sampled_log_prob_N=row.get("sampled_log_prob"),
        )

    def lengths(self, side: str) -> np.ndarray:
        """See `Examples`."""
        return self._table.lengths(side)

    def supervised_counts(self, side: str) -> np.ndarray:
        """See `Examples`."""
        return self._table.supervised_counts(side)


def token_row(example: Example) -> dict[str, Any]:
    """An example as a row of a token table."""
    return {
        "source": example.source,
        "digest": example.teacher.digest,
        "student_ids": example.student.ids_T,
        "student_supervised": example.student.supervised_T,
        "teacher_ids": example.teacher.ids_T,
        "teacher_supervised": example.teacher.supervised_T,
        "answer": example.answer,
        "sampled_log_prob": example.sampled_log_prob_N,
    }


class TeacherSequences:
    """The teacher's sequences of some rows of some tables, read when they are asked for.

    Raises RowsMismatchError for a row whose digest is not that of its ids.
    """

    def __init__(self, tables: Sequence[TokenTable], places: Sequence[tuple[int, int]]) -> None:
        self._tables = tables
        self._places = places

    def __iter__(self) -> Iterator[TokenSequence]:
        for table, index in self._places:
            row = self._tables[table][index]
            sequence = _sequence(row, "teacher")
            if sequence.digest != row["digest"]:
                raise RowsMismatchError(
                    f"the ids of token row {index} do not have the digest recorded for them; "
                    "delete the tokens artifact and run again"
                )
            yield sequence


class StoredStates:
    """A hidden-state reader as `HiddenStateSource`."""

    def __init__(self, reader: HiddenStateReader) -> None:
        self._reader = reader

    @property
    def hidden_size(self) -> int:
        """See `HiddenStateSource`."""
        return self._reader.layout.hidden_size

    def shard_of(self, digests: np.ndarray) -> np.ndarray:
        """In which shard each sequence lies, by digests uint8 [N, 16]."""
        return self._reader.shard_of(digests)

    def begin_step(self, step: int) -> None:
        """Nothing to get ready: rows are read when they are asked for."""

    def rows(self, sequence: TokenSequence) -> TeacherRows:
        """See `HiddenStateSource`."""
        bits_NH = self._reader.rows(sequence.digest, sequence.target_ids_N)
        states_NH = bfloat16_tensor(bits_NH)
        return TeacherRows(buffer_RH=states_NH, index_N=torch.arange(len(states_NH)))


def bfloat16_bits(states_NH: torch.Tensor) -> np.ndarray:
    """The bits of bfloat16 states as uint16 [N, H], sharing memory."""
    return states_NH.contiguous().view(torch.int16).numpy().view(np.uint16)


def bfloat16_tensor(bits_NH: np.ndarray) -> torch.Tensor:
    """Bfloat16 states [N, H] from their bits, sharing memory."""
    return torch.from_numpy(bits_NH.view(np.int16)).view(torch.bfloat16)


def _protocols(examples: TokenExamples, states: StoredStates) -> None:
    """Checked by mypy: the adapters satisfy the protocols."""
    _examples: Examples = examples
    _states: HiddenStateSource = states
