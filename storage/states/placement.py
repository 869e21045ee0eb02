"""Which shard and row each sequence goes to, when some shards are borrowed.

Dimensions: N sequences, K shards.
"""

import numpy as np

from storage.errors import StoreError
from storage.states.borrowing import Borrowed
from storage.states.layout import Layout, Sequences, assign, first_rows, shard_of


class Placement:
    """The borrowed shards first; behind them as many as the other sequences fill, back to back.

    `first_row` [N] is counted over all shards as if they were full. `order` [N] are the sequences'
    numbers, shard by shard, in the order of their rows.
    """

    def __init__(self, layout: Layout, sequences: Sequences, borrowed: Borrowed) -> None:
        counts, size = sequences.num_rows.astype(np.int64), layout.shard_rows
        if int(counts.sum()) != layout.num_rows:
            raise StoreError("the layout was not planned for these sequences")
        is_own = np.ones(len(counts), bool)
        is_own[borrowed.number] = False
        own, num_borrowed = np.flatnonzero(is_own), len(borrowed.shards)
        bounds = assign(counts[own], size)
        num_own = len(bounds) - 1 if len(own) or not num_borrowed else 0
        self.num_shards = num_borrowed + num_own
        self.first_row = np.zeros(len(counts), np.int64)
        self.first_row[own] = first_rows(counts[own], bounds, size) + num_borrowed * size
        if num_borrowed:  # what has no rows is at a row that every shard has
            self.first_row[own[counts[own] == 0]] = 0
        self.first_row[borrowed.number] = borrowed.first_row
        shard = shard_of(self.first_row, counts, size)
        self.order = np.lexsort((self.first_row, shard))
        self._bounds = np.searchsorted(shard[self.order], np.arange(self.num_shards + 1))
        self._counts, self._size = counts, size

    def sequences_of(self, shard: int) -> np.ndarray:
        """The numbers of a shard's sequences, in the order of their rows."""
        return self.order[self._bounds[shard] : self._bounds[shard + 1]]

    def rows_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of them the rows of the shard where it begins and ends."""
        numbers = self.sequences_of(shard)
        begin = self.first_row[numbers] - shard * self._size
        return begin, begin + self._counts[numbers]

    def num_rows(self, shard: int) -> int:
        """Up to where a shard is filled."""
        return int(self.rows_of(shard)[1].max(initial=0))
