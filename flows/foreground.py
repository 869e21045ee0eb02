"""A run in a terminal or a job: Ctrl-C and SIGTERM end it, with one line on how to go on.

Training saves first after a SIGTERM: see `tasks.execution.termination`.
"""

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from configs.secrets import public

# What is being told to Prefect when the time is up is not worth waiting for.
LEAVE_S = 3.5
INTERRUPTED = 128 + signal.SIGINT
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class Foreground:
    """Leaves the process; nothing that is done is lost by it.

    The ranks, and a temporary server, end with this process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = public(shlex.join(command))
        self._leaving = threading.Lock()

    def leave(self, why: str, code: int) -> None:
        """Say why, and how to go on, in one line; and go, whatever else is at work."""
        if not self._leaving.acquire(blocking=False):
            return
        text = f"{why}; what is done is kept, and this goes on from there: {self._command}"
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stdout.flush()
            sys.stderr.write(f"\n{text}\n")
            sys.stderr.flush()
        os._exit(code)

    def interrupted(self) -> None:
        """After a Ctrl-C."""
        self.leave("interrupted", INTERRUPTED)

    def terminated(self) -> None:
        """After a SIGTERM."""
        self.leave("terminated", TRY_AGAIN)

    def died(self, what: str) -> None:
        """After the death of something that the run depends on."""
        self.leave(what, 1)


@contextmanager
def foreground(command: Sequence[str]) -> Iterator[Foreground]:
    """Within, a Ctrl-C raises KeyboardInterrupt and leaves the process in seconds; a second one at
    once. A SIGTERM leaves it with the code `TRY_AGAIN`. `command` is what the user is told to give
    again.
    """
    own = Foreground(command)

    def on_terminate(_number: int, _frame: FrameType | None) -> None:
        own.terminated()

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: own.interrupted())
        logging.disable(logging.CRITICAL)  # of what ends because of it
        timer = threading.Timer(LEAVE_S, own.interrupted)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: on_terminate, signal.SIGINT: on_interrupt}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background, by the shell's will
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield own
    except KeyboardInterrupt:
        own.interrupted()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
