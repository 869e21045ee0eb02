"""Work done in the background, a bounded number of calls behind."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BoundedWorker:
    """One background thread that is at most `limit` calls behind; then the caller waits.

    Used as a context manager. An error of a call is raised by the next `submit` or at the end.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def submit(self, call: Callable[[], None]) -> None:
        """Queue a call."""
        while len(self._pending) >= self._limit:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(call))

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
