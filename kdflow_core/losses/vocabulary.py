"""The vocabulary that a softmax goes over: all of it here, or a part on every rank.

The element-wise stage of the loss and the divergences take sums, maxima and single tokens through
one of these two, so that each is written once. Dimensions: T tokens, V vocabulary (of this rank).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Vocabulary(Protocol):
    """What is taken over the vocabulary. Token ids are those of the whole vocabulary."""

    def size(self, x_TV: torch.Tensor) -> int:
        """The number of tokens of the whole vocabulary."""
        ...

    def log_softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T, V]."""
        ...

    def distribution(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and probabilities, [T, V]."""
        ...

    def sum(self, x_TV: torch.Tensor) -> torch.Tensor:
        """Sums over the vocabulary, [T]."""
        ...

    def dot(self, x_TV: torch.Tensor, y_TV: torch.Tensor) -> torch.Tensor:
        """Sums of products over the vocabulary, [T]."""
        ...

    def max(self, x_TV: torch.Tensor) -> torch.Tensor:
        """The largest values, [T]."""
        ...

    def top1(self, x_TV: torch.Tensor) -> torch.Tensor:
        """Ids of the largest values, [T]; of equal ones the first."""
        ...

    def at(self, x_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """The values of one token each, [T]."""
        ...

    def add_at_(self, x_TV: torch.Tensor, ids_T: torch.Tensor, values_T: torch.Tensor) -> None:
        """Add to the values of one token each, in place."""
        ...


class WholeVocabulary:
    """All of it is here."""

    def size(self, x_TV: torch.Tensor) -> int:
        """See `Vocabulary`."""
        return x_TV.shape[-1]

    def log_softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return torch.log_softmax(logits_TV, -1)

    def distribution(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Vocabulary`."""
        if logits_TV.device.type != "cpu":
            log_p_TV = self.log_softmax(logits_TV)
            return log_p_TV, log_p_TV.exp()
        # On a CPU an `exp` of its own takes longer than a softmax, which has it inside.
        p_TV = torch.softmax(logits_TV, -1)
        log_sum_T1 = logits_TV.amax(-1, keepdim=True) - p_TV.amax(-1, keepdim=True).log_()
        return logits_TV - log_sum_T1, p_TV

    def sum(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return x_TV.sum(-1)

    def dot(self, x_TV: torch.Tensor, y_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        product_T: torch.Tensor = torch.linalg.vecdot(x_TV, y_TV)
        return product_T

    def max(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return x_TV.amax(-1)

    def top1(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        if x_TV.device.type != "cpu":
            return x_TV.max(-1).indices
        # Vectorized, which torch's is not on a CPU: several times as fast.
        return torch.from_numpy(x_TV.detach().numpy().argmax(-1))

    def at(self, x_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return x_TV.gather(-1, ids_T.unsqueeze(-1)).squeeze(-1)

    def add_at_(self, x_TV: torch.Tensor, ids_T: torch.Tensor, values_T: torch.Tensor) -> None:
        """See `Vocabulary`."""
        x_TV.scatter_add_(-1, ids_T.unsqueeze(-1), values_T.unsqueeze(-1))


@dataclass(frozen=True, kw_only=True)
class ShardedVocabulary:
    """Every rank of `group` holds a run of the `whole` tokens, those from `first` on.

    The ranks call everything together, with the same rows.
    """

    first: int
    whole: int
    group: Any

    def size(self, x_TV: torch.Tensor) -> int:
        """See `Vocabulary`."""
        del x_TV
        return self.whole

    def log_softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        shifted_TV = logits_TV - self.max(logits_TV).unsqueeze(-1)
        return shifted_TV.sub_(self.sum(shifted_TV.exp()).log().unsqueeze(-1))

    def distribution(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Vocabulary`."""
        log_p_TV = self.log_softmax(logits_TV)
        return log_p_TV, log_p_TV.exp()

    def sum(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return self._reduced(x_TV.sum(-1), dist.ReduceOp.SUM)

    def dot(self, x_TV: torch.Tensor, y_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return self._reduced(torch.linalg.vecdot(x_TV, y_TV), dist.ReduceOp.SUM)

    def max(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return self._reduced(x_TV.amax(-1), dist.ReduceOp.MAX)

    def top1(self, x_TV: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        value_T, index_T = x_TV.max(-1)
        best_T = self._reduced(value_T.clone(), dist.ReduceOp.MAX)
        beyond = torch.iinfo(torch.int64).max
        return self._reduced(
            torch.where(value_T == best_T, index_T + self.first, beyond), dist.ReduceOp.MIN
        )

    def at(self, x_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        mine_T, place_T1 = self._place(ids_T, x_TV.shape[-1])
        value_T = torch.where(mine_T, x_TV.gather(-1, place_T1).squeeze(-1), 0)
        return self._reduced(value_T, dist.ReduceOp.SUM)

    def add_at_(self, x_TV: torch.Tensor, ids_T: torch.Tensor, values_T: torch.Tensor) -> None:
        """See `Vocabulary`."""
        mine_T, place_T1 = self._place(ids_T, x_TV.shape[-1])
        x_TV.scatter_add_(-1, place_T1, torch.where(mine_T, values_T, 0).unsqueeze(-1))

    def _place(self, ids_T: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are this rank's, and their columns (0 for the others)."""
        column_T = ids_T - self.first
        mine_T = (column_T >= 0) & (column_T < size)
        return mine_T, torch.where(mine_T, column_T, 0).unsqueeze(-1)

    def _reduced(self, x_T: torch.Tensor, op: Any) -> torch.Tensor:
        dist.all_reduce(x_T, op, group=self.group)
        return x_T
