"""The same work on many items, over the cores of this machine, in order.

The processes are forked, so that they have what the work needs without sending it. They end with
the one that forked them, however it ends.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from kdflow_core.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
ALONE = 1000  # items that are done before more processes are worth their start
BATCH = 50  # items that go to a process at a time
AHEAD = 3  # batches under way for each process
PR_SET_PDEATHSIG = 1

_work: Callable[[Any], Any] | None = None  # of a forked process


def usable_cores() -> int:
    """The cores that this process may use, where it can fork; else one."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(
    work: Callable[[T], R], items: Iterable[T], *, cores: int, alone: int = ALONE
) -> Iterator[R]:
    """`work` of every item, in their order; the first `alone` of them without other processes.

    `work` may not count on what it has changed in memory. Its exceptions are raised here, at its
    item's place or some before. Raises DataError when a process is killed.
    """
    source = iter(items)
    yield from map(work, islice(source, alone))
    more = list(islice(source, 1))
    rest = chain(more, source)
    if cores < 2 or not more:
        yield from map(work, rest)
        return
    pool = ProcessPoolExecutor(
        cores,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(work, os.getpid()),
    )
    pending: deque[Future[list[R]]] = deque()
    try:
        while batch := list(islice(rest, BATCH)):
            pending.append(pool.submit(_work_on, batch))
            if len(pending) > AHEAD * cores:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that works on the data was killed; if nobody did, the machine ran out of "
            "memory: run again with more, or on fewer cores (taskset)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    # A terminal's Ctrl-C is the parent's to handle, and its death this one's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work_on(batch: list[Any]) -> list[Any]:
    assert _work is not None
    return [_work(item) for item in batch]
