"""The side of a rank: requests in, events out, and signs of life.

From its first moment, before anything heavy is imported, a rank ends when the launcher does, and
the rest of its process group with it; and it beats: every few seconds it says where its main thread
stands and, at work, for how long.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

EVENT_PREFIX = "KDFLOW-EVENT "
BEAT_S = 2.0
STDIN, STDOUT = 0, 1
OURS = ("kdflow_core", "storage", "tasks")
ROOT = Path(__file__).parents[2]

_requests: "queue.Queue[str]" = queue.Queue()
_progress = threading.Event()
_busy = threading.Event()
_stop = threading.Event()
_stoppable = threading.Event()
_launched = threading.Event()
_writing = threading.Lock()


def begin() -> None:
    """Listen to the launcher, and beat. To be called once, before everything else.

    Nothing else can be read from standard input: a library that asks a question there finds its
    end, and does not wait for ever.
    """
    _launched.set()
    _busy.set()
    stdin = os.fdopen(os.dup(STDIN), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), STDIN)
    sys.stdin = os.fdopen(STDIN, encoding="utf-8", closefd=False)

    def read() -> None:
        for line in stdin:
            if json.loads(line).get("role") == "stop":
                _stop.set()
            else:
                _requests.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=_beat, args=(threading.get_ident(),), daemon=True).start()


def receive_requests() -> Iterator[str]:
    """The launcher's requests, in order. A rank that waits for one is not at work."""
    while True:
        if _requests.empty():
            _busy.clear()
        request = _requests.get()
        _busy.set()
        yield request


def reply(number: int, value: Any) -> None:
    """Reply to a call."""
    emit({"event": "reply", "number": number, "value": value})


def made_progress() -> None:
    """Say that work goes on, where the main thread may be seen to stand at one place."""
    _progress.set()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, this rank asks `is_asked_to_stop` again and again, and the launcher knows it.

    Schedulers send a SIGTERM to all processes of a job: it asks this rank the same.
    """
    _stoppable.set()
    emit({"event": "stoppable", "value": True})
    try:
        with _stopped_by_sigterm():
            yield
    finally:
        _stoppable.clear()
        emit({"event": "stoppable", "value": False})


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Within, a SIGTERM to a rank with a launcher asks it to stop."""
    if not _launched.is_set() or threading.current_thread() is not threading.main_thread():
        yield  # who has no launcher has a handler of its own; other threads get no signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ask_to_stop() -> bool:
    """Ask this process, where it is a rank without a launcher, to save what is done and to end;
    False where it cannot now.
    """
    if _stoppable.is_set():
        _stop.set()
    return _stoppable.is_set()


def is_asked_to_stop() -> bool:
    """Whether the launcher wants this rank to save what is done, and to end."""
    return _stop.is_set()


def is_launched() -> bool:
    """Whether this process has a launcher, which hears what it emits."""
    return _launched.is_set()


def emit(event: dict[str, Any]) -> None:
    """Send an event to the launcher, on a line of its own whatever else is being printed. Without
    a launcher there is nobody to send it to.
    """
    if not is_launched():
        return
    sys.stdout.flush()
    rest = f"\n{EVENT_PREFIX}{json.dumps(event)}\n".encode()
    with _writing:
        while rest:
            rest = rest[os.write(STDOUT, rest) :]


def _beat(main_thread: int) -> None:
    last: list[tuple[int, int]] = []
    since = time.monotonic()
    while True:
        frame = sys._current_frames().get(main_thread)
        stack = _stack(frame)
        if stack != last or _progress.is_set() or not _busy.is_set():
            _progress.clear()
            last, since = stack, time.monotonic()
        still_s = time.monotonic() - since if _busy.is_set() else None
        emit({"event": "beat", "still_s": still_s, "at": _place(frame)})
        del frame
        time.sleep(BEAT_S)


def _stack(frame: FrameType | None) -> list[tuple[int, int]]:
    """The stack of a thread, as something that changes when the thread moves on."""
    stack = []
    while frame is not None:
        stack.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return stack


def _place(frame: FrameType | None) -> str:
    """Where a thread stands: our innermost line, and the function that this has called."""
    inner = "" if frame is None else frame.f_code.co_name
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} in {inner}"
        frame = frame.f_back
    return inner or "its start"
