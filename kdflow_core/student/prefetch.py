"""Stored teacher states, read before the step that needs them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kdflow_core.contracts import SignalRows, SignalSource, TokenSequence

STEPS_AHEAD = 2
THREADS = 8  # enough requests in flight for an object store


class PrefetchedStates:
    """A `SignalSource` whose rows are read by threads while earlier steps compute.

    `sequences_of(step)` are this rank's teacher sequences of an optimizer step. What is held is at
    most the rows of `STEPS_AHEAD` + 1 steps. An error of reading is raised where the rows are asked
    for. The source must allow several threads.
    """

    def __init__(
        self,
        source: SignalSource,
        *,
        sequences_of: Callable[[int], Sequence[TokenSequence]],
        num_steps: int,
    ) -> None:
        self.hidden_size = source.hidden_size
        self._source = source
        self._sequences_of = sequences_of
        self._num_steps = num_steps
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="states")
        self._steps: dict[int, dict[bytes, Future[SignalRows]]] = {}
        self._rows: dict[bytes, Future[SignalRows]] = {}

    def begin_step(self, step: int) -> None:
        """Drop earlier steps' rows, and start reading the coming ones."""
        for ahead in range(step, min(step + STEPS_AHEAD + 1, self._num_steps)):
            if ahead not in self._steps:
                self._steps[ahead] = {
                    s.digest: self._pool.submit(self._source.rows, s)
                    for s in self._sequences_of(ahead)
                }
        self._steps = {k: rows for k, rows in self._steps.items() if k >= step}
        self._rows = self._steps[step]

    def rows(self, sequence: TokenSequence) -> SignalRows:
        """See `SignalSource`."""
        ready = self._rows.get(sequence.digest)
        return self._source.rows(sequence) if ready is None else ready.result()

    def close(self) -> None:
        """End the threads; what they have not begun is not read."""
        self._pool.shutdown(cancel_futures=True)
