"""Which point of the held-out curve has been the best so far, and whether to wait for a better one.

All ranks have the same points, and so decide alike.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Point:
    """A figure of the curve after so many optimizer steps; the less, the better."""

    step: int
    value: float


class BestPoint:
    """The best of the points that are added. With `patience`, so many may follow it."""

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self.best: Point | None = None
        self.num_since = 0

    @property
    def is_enough(self) -> bool:
        """Whether training need not go on."""
        return self._patience is not None and self.num_since >= self._patience

    def add(self, point: Point) -> bool:
        """Whether this is the best. A figure that is no number is not."""
        if point.value < (math.inf if self.best is None else self.best.value):
            self.best, self.num_since = point, 0
            return True
        self.num_since += 1
        return False

    def restore(self, points: Iterable[Point], saved: Collection[int]) -> None:
        """Go on behind earlier points; the best of them is one whose step is `saved`."""
        points = sorted(points, key=lambda point: point.step)
        kept = [p for p in points if p.step in saved and not math.isnan(p.value)]
        self.best = min(kept, key=lambda point: point.value, default=None)
        if self.best is not None:
            self.num_since = sum(point.step > self.best.step for point in points)
