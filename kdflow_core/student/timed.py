"""How long training waits for what teachers say."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kdflow_core.contracts import SignalRows, SignalSource, TokenSequence


class TimedSignals:
    """A `SignalSource` that counts the `seconds` in which it was waited for: stored states that are
    read, a live teacher that computes.
    """

    def __init__(self, source: SignalSource) -> None:
        self.hidden_size = source.hidden_size
        self.seconds = 0.0
        self._source = source

    def begin_step(self, step: int) -> None:
        """See `SignalSource`."""
        with self._counted():
            self._source.begin_step(step)

    def rows(self, sequence: TokenSequence) -> SignalRows:
        """See `SignalSource`."""
        with self._counted():
            return self._source.rows(sequence)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
