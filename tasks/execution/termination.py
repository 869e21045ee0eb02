"""A SIGTERM, which Slurm and Kubernetes send before they kill: training saves first."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAVE_S = 25.0  # by default both wait for 30 seconds


@contextmanager
def saving_first(save: Callable[[float], object]) -> Iterator[None]:
    """Within, what a handler of SIGTERM raises waits until `save` is done, which is told how many
    seconds it has.

    Prefect's handler raises, and has to stay the one that is installed: Prefect kills at once what
    has another one. A second SIGTERM ends the waiting.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        save(SAVE_S)
        raise


@contextmanager
def saving_before_the_end(ask_to_stop: Callable[[], bool]) -> Iterator[None]:
    """Within, a SIGTERM asks this rank, which nobody has launched, to save and to end, and is
    passed on to whoever it was for when it has, after `SAVE_S` seconds, or at once where it cannot
    (`ask_to_stop` says so). Nothing is raised in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has signals for the main thread alone
        return
    asked = False
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def on_terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not ask_to_stop():
            asked = False
            signal.signal(signal.SIGTERM, before)
            _terminate()
            return
        asked = True
        timer = threading.Timer(SAVE_S, _terminate)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if asked:
            _terminate()


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
