"""Ranks as processes of this machine.

Each rank runs in a session of its own and holds the reading end of a pipe whose writing end only
the launcher has. The launcher's death, however violent, closes the pipe, and the rank ends its
whole process group: nothing is orphaned. A rank's death ends the other ranks.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from kdflow_core.errors import WorkerError

EVENT_PREFIX = "KDFLOW-EVENT "
GRACE_S = 5.0
KEPT_LINES = 40


@dataclass
class _Rank:
    process: "subprocess.Popen[str]"
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    error: dict[str, Any] | None = None
    reader: threading.Thread | None = None


def run_ranks(
    *,
    module: str,
    request: str,
    num_ranks: int,
    on_event: Callable[[dict[str, Any]], None],
    on_line: Callable[[int, str], None],
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m module` as `num_ranks` ranks and wait for all of them.

    Every rank reads `request` (one line) from standard input. `on_event` gets the events that ranks
    emit, `on_line` every other line that a rank prints; both are called in this thread. `env` adds
    to the environment what is not set there.

    Raises:
        WorkerError: a rank failed. All others have been ended by then.
    """
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="kdflow-rendezvous-") as folder:
        ranks: list[_Rank] = []
        try:
            for number in range(num_ranks):
                rank = _start(module, number, num_ranks, f"{folder}/store", env or {})
                ranks.append(rank)
                _feed(rank.process, request)
                rank.reader = threading.Thread(
                    target=_read, args=(number, rank.process, lines), daemon=True
                )
                rank.reader.start()
            _supervise(ranks, lines, on_event, on_line)
        finally:
            _end(ranks)


def _start(
    module: str, rank: int, num_ranks: int, rendezvous: str, defaults: Mapping[str, str]
) -> _Rank:
    env = {**defaults, **os.environ} | {
        "KDFLOW_RANK": str(rank),
        "KDFLOW_NUM_RANKS": str(num_ranks),
        "KDFLOW_RENDEZVOUS": rendezvous,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress is reported as events
    }
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )
    return _Rank(process)


def _feed(process: "subprocess.Popen[str]", request: str) -> None:
    stdin = process.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit is reported later
        stdin.write(request.replace("\n", " ") + "\n")
        stdin.flush()


def _read(
    rank: int, process: "subprocess.Popen[str]", lines: "queue.Queue[tuple[int, str | None]]"
) -> None:
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put((rank, line.rstrip("\n")))
    lines.put((rank, None))


def _supervise(
    ranks: list[_Rank],
    lines: "queue.Queue[tuple[int, str | None]]",
    on_event: Callable[[dict[str, Any]], None],
    on_line: Callable[[int, str], None],
) -> None:
    running = set(range(len(ranks)))
    while running:
        number, line = lines.get()
        rank = ranks[number]
        if line is None:
            running.discard(number)
            code = rank.process.wait()
            if code != 0:
                raise _failure(number, rank, code)
        elif not line.startswith(EVENT_PREFIX):
            rank.tail.append(line)
            on_line(number, line)
        else:
            event = json.loads(line.removeprefix(EVENT_PREFIX))
            if event["event"] == "error":
                rank.error = event
            else:
                on_event(event)


def _failure(number: int, rank: _Rank, code: int) -> WorkerError:
    if rank.error is not None:
        message, expected = rank.error["message"], rank.error["expected"]
        if expected:
            return WorkerError(message, expected=True)
        return WorkerError(f"rank {number} failed: {message}", details=rank.error["traceback"])
    cause = f"exit code {code}"
    if code < 0:
        cause = f"signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += " (if nobody sent it, the machine ran out of memory)"
    return WorkerError(f"rank {number} ended by {cause}", details="\n".join(rank.tail))


def _end(ranks: list[_Rank]) -> None:
    """TERM, grace, KILL, for every process group that is still there."""
    alive = [rank.process for rank in ranks if rank.process.poll() is None]
    for process in alive:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in alive:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
    for rank in ranks:
        if rank.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                rank.process.stdin.close()
        if rank.reader is not None:
            rank.reader.join(timeout=GRACE_S)


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


# The side of the rank.


def receive_request(stdin: IO[str]) -> str:
    """The launcher's request; from now on this process ends when the launcher does."""
    request = stdin.readline()

    def watch() -> None:
        stdin.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return request


def emit(event: dict[str, Any]) -> None:
    """Send an event to the launcher."""
    sys.stdout.write(f"{EVENT_PREFIX}{json.dumps(event)}\n")
    sys.stdout.flush()
