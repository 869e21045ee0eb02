"""Work done in the background, a bounded number of calls behind."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BoundedWorker:
    """One background thread that is at most `limit` calls behind; then the caller waits.

    Used as a context manager. An error of a call is raised by the next `submit` or at the end.
    """

    def __init__(self, limit: int) -> None:
        self.waited_s = 0.0  # by callers of `submit`
        self._limit = limit
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def submit(self, call: Callable[[], None]) -> None:
        """Queue a call."""
        started = time.perf_counter()
        while len(self._pending) >= self._limit:
            self._pending[0].result()
            self._pending.popleft()
        self.waited_s += time.perf_counter() - started
        self._pending.append(self._pool.submit(call))

    @property
    def behind(self) -> int:
        """How many calls are not done."""
        return sum(not pending.done() for pending in self._pending)

    def __enter__(self) -> "BoundedWorker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What was submitted is finished even when the caller fails: it is paid for.
        self._pool.shutdown(wait=True)
        if kind is None:
            for pending in self._pending:
                pending.result()
