"""Rectangular batches under a token budget, and the teacher's rows for them.

Dimensions: B sequences, T tokens (padded), N supervised tokens, R rows of a teacher's output,
G hidden size of the teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdflow_core.contracts import Example, HiddenRows, SignalRows, SignalSource, TargetRows
from kdflow_core.errors import AlignmentError
from kdflow_core.uploads import upload

# What a pass costs beside its tokens, as a part of the budget: one in so many.
PASS_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Division:
    """How sequences are divided into batches: of `tokens` positions at most, those above
    `batched_length`, where there is one, by themselves; padded, or `packed` behind one another. In
    attention, a sequence of `attention_length` tokens costs as much as in all else.
    """

    tokens: int
    batched_length: int | None = None
    packed: bool = False
    attention_length: int | None = None

    def costs(self, lengths_N: np.ndarray) -> np.ndarray:
        """What sequences cost to compute, in tokens of short ones."""
        if self.attention_length is None:
            return lengths_N.astype(np.float64)
        return np.asarray(lengths_N * (1 + lengths_N / self.attention_length))

    def batches(self, lengths_N: np.ndarray, *, least: int = 1) -> list[list[int]]:
        """Indices; if packed, in at least so many batches where there are sequences for them."""
        if not self.packed:
            return batch_by_tokens(lengths_N, self.tokens, self.batched_length)
        longest = self.tokens if self.batched_length is None else self.batched_length
        alone = np.flatnonzero(lengths_N > min(longest, self.tokens))
        rest = np.flatnonzero(lengths_N <= min(longest, self.tokens))
        least -= len(alone)
        together = _evenly(lengths_N[rest], self.costs(lengths_N[rest]), self.tokens, least)
        ordered = sorted(alone.tolist(), key=lambda i: -int(lengths_N[i]))
        return [[i] for i in ordered] + [rest[batch].tolist() for batch in together]

    def positions(self, batches: Sequence[Sequence[int]], lengths_N: np.ndarray) -> int:
        """The positions that batches have, padding included."""
        used = [lengths_N[list(batch)] for batch in batches if batch]
        return int(sum(own.sum() if self.packed else len(own) * own.max() for own in used))


def _evenly(lengths_N: np.ndarray, costs_N: np.ndarray, budget: int, least: int) -> list[list[int]]:
    """Indices in as few groups as the budget of tokens allows, but `least` at the least, of about
    equal cost; the dearest sequences first in each. None is longer than the budget.
    """
    order = np.argsort(-costs_N, kind="stable")
    count = min(len(order), max(least, math.ceil(lengths_N.sum() / budget)))
    while count:
        groups: list[list[int]] = [[] for _ in range(count)]
        cost_C, room_C = np.zeros(count), np.full(count, budget)
        for i in order:
            open_C = np.where(room_C >= lengths_N[i], cost_C, np.inf)
            chosen = int(open_C.argmin())
            if not np.isfinite(open_C[chosen]):
                break
            groups[chosen].append(int(i))
            cost_C[chosen] += costs_N[i]
            room_C[chosen] -= lengths_N[i]
        else:
            return groups
        count += 1
    return []


def batch_by_tokens(
    lengths: Sequence[int] | np.ndarray, budget: int, longest: int | None = None
) -> list[list[int]]:
    """Indices grouped so that (sequences x longest) stays within `budget` tokens, and that the sum
    of these areas, with something for every batch, is the least that there is.

    Longest first, so that an out-of-memory shows at once. A sequence longer than the budget is a
    batch of its own, and so is one above `longest` (see `batched_length`).
    """
    order_N = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    sorted_N = np.asarray(lengths, np.int64)[order_N]
    alone = 0 if longest is None else int((sorted_N > longest).sum())
    singles, order_N, sorted_N = order_N[:alone], order_N[alone:], sorted_N[alone:]
    least = np.zeros(len(order_N) + 1, np.int64)  # the least cost of so many of the longest
    begins = np.zeros(len(order_N) + 1, np.int64)  # where the last batch of those begins
    first = 0
    for end in range(1, len(order_N) + 1):
        # A batch from `first` on is within the budget; those that begin later are smaller.
        while first < end - 1 and (end - first) * sorted_N[first] > budget:
            first += 1
        candidates = np.arange(first, end)
        costs = least[candidates] + (end - candidates) * sorted_N[candidates]
        best = int(costs.argmin())  # of equal ones that with the largest last batch
        least[end], begins[end] = costs[best] + budget // PASS_SHARE, first + best
    batches: list[list[int]] = []
    end = len(order_N)
    while end:
        batches.append(order_N[begins[end] : end].tolist())
        end = int(begins[end])
    return [[int(i)] for i in singles] + batches[::-1]


def pad_right(sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Ids [B, T] padded on the right; under causal attention no real row sees the padding."""
    width = max(len(ids) for ids in sequences)
    batch_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, ids in enumerate(sequences):
        batch_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch_BT


def pack_by_tokens(lengths: Sequence[int], budget: int, *, max_sequences: int) -> list[list[int]]:
    """Indices grouped so that the sum of lengths stays within `budget` tokens; longest first.

    A sequence longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if not batches or lengths[i] > room or len(batches[-1]) == max_sequences:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= int(lengths[i])
    return batches


def hidden_rows(rows: SignalRows) -> HiddenRows:
    """Rows of hidden states. Raises AlignmentError for signals that are something else."""
    if not isinstance(rows, HiddenRows):
        raise AlignmentError("these signals are not hidden states, and nothing here reads others")
    return rows


def target_rows(rows: SignalRows) -> TargetRows:
    """Log-probabilities of tokens. Raises AlignmentError for signals that are something else."""
    if not isinstance(rows, TargetRows):
        raise AlignmentError("these signals are not the log-probabilities of tokens")
    return rows


def teacher_rows(example: Example, signals: SignalSource, view: str = "teacher") -> HiddenRows:
    """The states, for the student's tokens that the teacher of a view says something about (see
    `taught_tokens`).

    Raises AlignmentError when rows and the student's tokens differ in number.
    """
    rows = hidden_rows(signals.rows(example.views[view]))
    alignment = example.alignments.get(view)
    if alignment is not None:
        return rows_at(rows, alignment.pairs_P2[:, 1])
    num_tokens = len(example.student.target_positions_N)
    if len(rows.index_N) != num_tokens:
        raise AlignmentError(f"{len(rows.index_N)} teacher rows for {num_tokens} student tokens")
    return rows


def rows_at(rows: HiddenRows, chosen: np.ndarray) -> HiddenRows:
    """Some of a sequence's rows, by their numbers."""
    index = torch.from_numpy(chosen.astype(np.int64)).to(rows.index_N.device)
    return HiddenRows(buffer_RH=rows.buffer_RH, index_N=rows.index_N[index])


def taught_tokens(example: Example, view: str = "teacher") -> np.ndarray:
    """Which of the student's supervised tokens the teacher of a view says something about: all, or
    with an alignment those of its pairs.
    """
    alignment = example.alignments.get(view)
    if alignment is not None:
        return alignment.pairs_P2[:, 0].astype(np.int64)
    return np.arange(len(example.student.target_positions_N))


def select_rows(
    rows: Sequence[HiddenRows], *, hidden_size: int, device: torch.device
) -> torch.Tensor:
    """The rows of several sequences, back to back: [N, G] bfloat16. Each is copied once."""
    place = rows[0].buffer_RH.device if rows else device
    selected_NG = torch.empty(
        sum(len(r.index_N) for r in rows), hidden_size, dtype=torch.bfloat16, device=place
    )
    begin = 0
    for part in rows:
        end = begin + len(part.index_N)
        torch.index_select(part.buffer_RH, 0, part.index_N, out=selected_NG[begin:end])
        begin = end
    return upload(selected_NG, device)
