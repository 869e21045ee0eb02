"""Which sequences go into which optimizer step, on which rank, in which micro-batch.

A pure function of lengths, seed and sizes: every rank computes the whole plan, so all of them know
the global token count of a step without talking, and a resumed run goes on in the same order.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kdflow_core.batching import batch_by_tokens


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """One optimizer step: `micro_batches[rank][i]` are sequence indices; all ranks have the same
    number of micro-batches (some may be empty). `num_tokens` is the supervised tokens of the step
    over all ranks, `num_input_tokens` all of its tokens.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int
    num_input_tokens: int
    epoch: float


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The steps of a run. Every epoch is a permutation of its own; its last batch may be small."""

    lengths: np.ndarray
    supervised_counts: np.ndarray
    global_batch_size: int
    micro_batch_tokens: int
    num_ranks: int
    seed: int
    epochs: int | None
    max_steps: int | None

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
        order = _epoch_order(self.seed, epoch, len(self.lengths))
        begin = position * self.global_batch_size
        return [int(i) for i in order[begin : begin + self.global_batch_size]]

    def step(self, step: int) -> StepBatches:
        """How a step (counted from 0) is divided."""
        chosen = self.sequences(step)
        ranks: list[list[int]] = [[] for _ in range(self.num_ranks)]
        loads = [0] * self.num_ranks
        for index in sorted(chosen, key=lambda i: (-int(self.lengths[i]), i)):
            rank = loads.index(min(loads))
            ranks[rank].append(index)
            loads[rank] += int(self.lengths[index])
        divided = [
            [
                tuple(mine[i] for i in batch)
                for batch in batch_by_tokens(
                    [self.lengths[i] for i in mine], self.micro_batch_tokens
                )
            ]
            for mine in ranks
        ]
        most = max(len(batches) for batches in divided)
        return StepBatches(
            micro_batches=tuple((*batches, *[()] * (most - len(batches))) for batches in divided),
            num_tokens=int(self.supervised_counts[chosen].sum()),
            num_input_tokens=int(self.lengths[chosen].sum()),
            epoch=(step + 1) / self.steps_per_epoch,
        )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The epoch's permutation; kept, as every step of the epoch takes its part of it."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def learning_rate(
    *, step: int, num_steps: int, peak: float, warmup_fraction: float, min_ratio: float
) -> float:
    """Linear warm-up, then cosine to `min_ratio * peak`. `step` counts from 0."""
    warmup = round(warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
