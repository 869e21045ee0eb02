"""Which sequences go into which optimizer step, on which rank, in which micro-batch.

A pure function of lengths, seed and sizes: every rank computes the whole schedule, so all know
the global token count of a step without talking, and a resumed run goes on in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kdflow_core.batching import Division


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """One optimizer step: `micro_batches[rank][i]` are sequence indices; all ranks have the same
    number of micro-batches (some may be empty). `num_tokens` is the supervised tokens of the step
    over all ranks, `num_input_tokens` all of its tokens, `num_positions` these with their padding.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int
    num_input_tokens: int
    num_positions: int
    epoch: float


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """The steps of a run. Every epoch is a permutation of its own; its last batch may be small.

    The sequences of a step are divided over the ranks by what they cost. With a `window`, an epoch
    visits the `groups` (one number per sequence: what lies together on disk) in random order, and
    shuffles the sequences of `window` groups at a time, so that reading stays local.
    """

    lengths: np.ndarray
    supervised_counts: np.ndarray
    global_batch_size: int
    division: Division
    num_ranks: int
    seed: int
    epochs: int | None
    max_steps: int | None
    groups: np.ndarray | None = None
    window: int | None = None
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every sequence once."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        return (self.epochs or 0) * self.steps_per_epoch

    def sequences(self, step: int) -> list[int]:
        """The sequences of a step (counted from 0), independent of ranks and micro-batches."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        begin = position * self.global_batch_size
        return [int(i) for i in order[begin : begin + self.global_batch_size]]

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation; kept with the next one, as every step takes its part."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            for other in [e for e in self._orders if abs(e - epoch) > 1]:
                del self._orders[other]
            self._orders[epoch] = (
                rng.permutation(len(self.lengths))
                if self.groups is None or self.window is None
                else windowed_permutation(rng, self.groups, self.window)
            )
        return self._orders[epoch]

    def step(self, step: int) -> StepBatches:
        """How a step (counted from 0) is divided."""
        chosen = self.sequences(step)
        ranks: list[list[int]] = [[] for _ in range(self.num_ranks)]
        loads = [0.0] * self.num_ranks
        costs = dict(zip(chosen, self.division.costs(self.lengths[chosen]).tolist(), strict=True))
        for index in sorted(chosen, key=lambda i: (-costs[i], i)):
            rank = loads.index(min(loads))
            ranks[rank].append(index)
            loads[rank] += costs[index]
        divided = [self._divided(mine) for mine in ranks]
        most = max(len(batches) for batches in divided)
        if self.division.packed:  # smaller batches, rather than some without sequences
            divided = [
                batches if len(batches) == most else self._divided(mine, least=most)
                for batches, mine in zip(divided, ranks, strict=True)
            ]
            most = max(len(batches) for batches in divided)
        return StepBatches(
            micro_batches=tuple((*batches, *[()] * (most - len(batches))) for batches in divided),
            num_tokens=int(self.supervised_counts[chosen].sum()),
            num_input_tokens=int(self.lengths[chosen].sum()),
            num_positions=self.num_positions(divided),
            epoch=(step + 1) / self.steps_per_epoch,
        )

    def _divided(self, mine: list[int], *, least: int = 1) -> list[tuple[int, ...]]:
        """A rank's micro-batches."""
        batches = self.division.batches(self.lengths[mine], least=least)
        return [tuple(mine[i] for i in batch) for batch in batches]

    def num_positions(self, ranks: Sequence[Sequence[Sequence[int]]]) -> int:
        """The positions of all ranks' micro-batches, padding included."""
        return sum(self.division.positions(mine, self.lengths) for mine in ranks)


def windowed_permutation(rng: np.random.Generator, groups: np.ndarray, window: int) -> np.ndarray:
    """Groups in random order, and the members of each `window` of them in random order."""
    members = rng.permutation(len(groups))
    place = rng.permutation(int(groups.max()) + 1)[groups[members]]
    return np.asarray(members[np.argsort(place // window, kind="stable")])
