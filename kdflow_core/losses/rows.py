"""Tokens of all ranks on each of them, for a vocabulary that is spread over the ranks.

Dimensions: T tokens of this rank (or of all).
"""

import torch
import torch.distributed as dist

from kdflow_core.losses.vocabulary import ShardedVocabulary, WholeVocabulary


class RowExchange:
    """Gathers rows of all ranks, in their order; nothing happens with a whole vocabulary."""

    def __init__(
        self,
        num_rows: int,
        vocabulary: WholeVocabulary | ShardedVocabulary,
        device: torch.device,
    ) -> None:
        self._sharded = isinstance(vocabulary, ShardedVocabulary)
        self._counts, begin = [num_rows], 0
        if isinstance(vocabulary, ShardedVocabulary):
            self._group = vocabulary.group
            mine = torch.tensor([num_rows], device=device)
            counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(counts, mine, group=self._group)
            self._counts = [int(count) for count in counts]
            begin = sum(self._counts[: dist.get_rank(self._group)])
        self._own = slice(begin, begin + num_rows)

    def gather(self, x_T: torch.Tensor) -> torch.Tensor:
        """All ranks' rows."""
        if not self._sharded:
            return x_T
        longest = max(self._counts)
        padded_T = x_T.new_zeros(longest, *x_T.shape[1:])
        padded_T[: len(x_T)] = x_T
        parts = [torch.empty_like(padded_T) for _ in self._counts]
        dist.all_gather(parts, padded_T, group=self._group)
        return torch.cat([p[:n] for p, n in zip(parts, self._counts, strict=True)])

    def own(self, x_T: torch.Tensor) -> torch.Tensor:
        """This rank's rows of all."""
        return x_T[self._own]

    def scatter(self, x_T: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of their rows for this one."""
        if self._sharded:
            dist.all_reduce(x_T, group=self._group)
        return x_T[self._own]
