"""The store's files as the protocols of the core.

Dimensions: N rows of a sequence, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdflow_core.contracts import (
    Alignment,
    Example,
    Examples,
    HiddenRows,
    SignalSource,
    TargetRows,
    TokenSequence,
)
from storage.errors import RowsMismatchError
from storage.log_probs import LogProbs
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable

LOG_PROBS_FILE = "log_probs.arrow"


def _sequence(row: Mapping[str, Any], view: str) -> TokenSequence:
    """One view of a token row."""
    return TokenSequence(
        ids_T=row[f"{view}_ids"],
        supervised_T=row[f"{view}_supervised"].astype(bool),
        media=tuple(row[f"{view}_media"]),
    )


def _alignments(row: Mapping[str, Any], views: Sequence[str]) -> dict[str, Alignment]:
    """The alignments of a token row."""
    return {
        view: Alignment(
            pairs_P2=row[f"{view}_pairs"].reshape(-1, 2),
            spans_S4=row[f"{view}_spans"].reshape(-1, 4),
        )
        for view in views
        if row[f"{view}_pairs"] is not None
    }


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
            views={view: _sequence(row, view) for view in self._table.views},
            alignments=_alignments(row, self._table.views[1:]),
            label=row["label"],
            sampled_log_prob_N=row.get("sampled_log_prob"),
        )

    def sources(self) -> list[str]:
        """The data source of every example."""
        number, names = self._table.sources()
        return [names[k] for k in number]

    def of_sources(self, chosen: frozenset[str] | None) -> list[int]:
        """The examples of some data sources (None: of all)."""
        return [i for i, name in enumerate(self.sources()) if chosen is None or name in chosen]

    def lengths(self, view: str) -> np.ndarray:
        """See `Examples`."""
        return self._table.lengths(view)

    def supervised_counts(self, view: str) -> np.ndarray:
        """See `Examples`."""
        return self._table.supervised_counts(view)


def evenly_spread(indices: Sequence[int], count: int) -> list[int]:
    """Up to `count` of some indices, at even distances."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices)))
    return [indices[int(place)] for place in places]


def token_row(example: Example) -> dict[str, Any]:
    """An example as a row of a token table."""
    row: dict[str, Any] = {
        "source": example.source,
        "label": example.label,
        "sampled_log_prob": example.sampled_log_prob_N,
    }
    for view, sequence in example.views.items():
        row |= {
            f"{view}_ids": sequence.ids_T,
            f"{view}_supervised": sequence.supervised_T,
            f"{view}_media": list(sequence.media),
            f"{view}_digest": sequence.digest,
        }
    for view, alignment in example.alignments.items():
        row |= {
            f"{view}_pairs": alignment.pairs_P2.ravel(),
            f"{view}_spans": alignment.spans_S4.ravel(),
        }
    return row


class TeacherSequences:
    """A teacher's sequences of some rows of some tables, read when they are asked for.

    Raises RowsMismatchError for a row whose digest is not that of its ids.
    """

    def __init__(
        self,
        tables: Sequence[TokenTable],
        places: Sequence[tuple[int, int]],
        view: str = "teacher",
    ) -> None:
        self._tables = tables
        self._places = places
        self._view = view

    def __iter__(self) -> Iterator[TokenSequence]:
        for table, index in self._places:
            row = self._tables[table][index]
            sequence = _sequence(row, self._view)
            if sequence.digest != row[f"{self._view}_digest"]:
                raise RowsMismatchError(
                    f"the ids of token row {index} do not have the digest recorded for them; "
                    "delete the tokens artifact and run again"
                )
            yield sequence


class StoredStates:
    """A hidden-state reader as `SignalSource`."""

    def __init__(self, reader: HiddenStateReader) -> None:
        self._reader = reader

    @property
    def hidden_size(self) -> int:
        """See `SignalSource`."""
        return self._reader.layout.hidden_size

    def shard_of(self, digests: np.ndarray) -> np.ndarray:
        """The shard that holds each sequence, by digests uint8 [N, 16]."""
        return self._reader.shard_of(digests)

    def begin_step(self, step: int) -> None:
        """Nothing to get ready: rows are read when they are asked for."""

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        """See `SignalSource`."""
        bits_NH = self._reader.rows(sequence.digest, sequence.target_ids_N)
        states_NH = bfloat16_tensor(bits_NH)
        return HiddenRows(buffer_RH=states_NH, index_N=torch.arange(len(states_NH)))


class StoredLogProbs:
    """Log-probabilities of the samples' own tokens as `SignalSource`."""

    hidden_size = 0

    def __init__(self, found: LogProbs) -> None:
        self._found = found

    def begin_step(self, step: int) -> None:
        """Nothing to get ready: they are mapped into memory."""

    def rows(self, sequence: TokenSequence) -> TargetRows:
        """See `SignalSource`."""
        count = int(sequence.supervised_T.sum())
        log_prob_N = self._found.of(sequence.digest, count)
        return TargetRows(log_prob_N=torch.tensor(log_prob_N))

    def close(self) -> None:
        """Nothing to end."""


def bfloat16_bits(states_NH: torch.Tensor) -> np.ndarray:
    """The bits of bfloat16 states as uint16 [N, H], sharing memory."""
    return states_NH.contiguous().view(torch.int16).numpy().view(np.uint16)


def bfloat16_tensor(bits_NH: np.ndarray) -> torch.Tensor:
    """Bfloat16 states [N, H] from their bits, sharing memory."""
    return torch.from_numpy(bits_NH.view(np.int16)).view(torch.bfloat16)


def _protocols(examples: TokenExamples, states: StoredStates, log_probs: StoredLogProbs) -> None:
    """Checked by mypy: the adapters satisfy the protocols."""
    _examples: Examples = examples
    _sources: list[SignalSource] = [states, log_probs]
