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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kdflow_core.errors import WorkerError

EVENT_PREFIX = "KDFLOW-EVENT "
GRACE_S = 5.0
KEPT_LINES = 40
STDIN = 0


@dataclass
class _Rank:
    process: "subprocess.Popen[str]"
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    error: dict[str, Any] | None = None
    reader: threading.Thread | None = None
    answers: deque[Any] = field(default_factory=deque)


def run_ranks(
    *,
    module: str,
    request: str,
    num_ranks: int,
    on_event: Callable[[dict[str, Any]], None],
    on_line: Callable[[int, str], None],
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `python -m module` as ranks, each with `request`, and wait for all of them to end.

    See `RankGroup`. Raises WorkerError.
    """
    with RankGroup(
        module=module, num_ranks=num_ranks, on_event=on_event, on_line=on_line, env=env
    ) as group:
        group.send(request)
        group.wait()


class RankGroup:
    """`python -m module` as `num_ranks` ranks, which take requests, each a line of standard input.

    `on_event` gets the events that ranks emit, `on_line` every other line that a rank prints; both
    are called in the thread that waits. `env` adds to the environment what is not set there;
    `arguments` stand on the command line, for people who look at their processes. Used
    as a context manager, or closed. What raises WorkerError has ended all ranks.
    """

    def __init__(
        self,
        *,
        module: str,
        num_ranks: int,
        on_event: Callable[[dict[str, Any]], None],
        on_line: Callable[[int, str], None],
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self._on_event = on_event
        self._on_line = on_line
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="kdflow-rendezvous-")
        self._ranks: list[_Rank] = []
        try:
            for number in range(num_ranks):
                command = [sys.executable, "-m", module, *arguments]
                rank = _start(command, number, num_ranks, f"{self._folder.name}/store", env or {})
                self._ranks.append(rank)
                rank.reader = threading.Thread(
                    target=_read, args=(number, rank.process, self._lines), daemon=True
                )
                rank.reader.start()
        except BaseException:
            self.close()
            raise

    def send(self, request: str) -> None:
        """Give a request to every rank; they take them in order."""
        for rank in self._ranks:
            _feed(rank.process, request)

    def answers(self) -> list[Any]:
        """Wait for every rank's answer to the oldest request that has none yet, in their order.

        Raises WorkerError: a rank failed.
        """
        while not all(rank.answers for rank in self._ranks):
            if not self._take():
                self.close()
                raise WorkerError("a rank ended without an answer")
        return [rank.answers.popleft() for rank in self._ranks]

    def wait(self) -> None:
        """Wait for the ranks to end. Raises WorkerError: a rank failed."""
        running = len(self._ranks)
        while running:
            running -= not self._take()

    def close(self) -> None:
        """End the ranks. May be called twice."""
        _end(self._ranks)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> bool:
        """Take a line that a rank has printed; False when it has ended well instead."""
        number, line = self._lines.get()
        rank = self._ranks[number]
        if line is None:
            code = rank.process.wait()
            if code != 0:
                self.close()
                raise _failure(number, rank, code)
            return False
        if not line.startswith(EVENT_PREFIX):
            rank.tail.append(line)
            self._on_line(number, line)
            return True
        event = json.loads(line.removeprefix(EVENT_PREFIX))
        if event["event"] == "error":
            rank.error = event
        elif event["event"] == "answer":
            rank.answers.append(event["value"])
        else:
            self._on_event(event)
        return True


def _start(
    command: list[str], rank: int, num_ranks: int, rendezvous: str, defaults: Mapping[str, str]
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
        command,
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


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The side of the rank.


def receive_requests() -> Iterator[str]:
    """The launcher's requests, as they come over standard input; from now on this process ends when
    the launcher does, and the rest of its process group with it.

    Nothing else can be read from standard input: a library that asks a question there finds its
    end, and does not wait for ever.
    """
    lines: queue.Queue[str] = queue.Queue()
    stdin = os.fdopen(os.dup(STDIN), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), STDIN)
    sys.stdin = os.fdopen(STDIN, encoding="utf-8", closefd=False)

    def read() -> None:
        for line in stdin:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def answer(value: Any) -> None:
    """Answer the request at hand."""
    emit({"event": "answer", "value": value})


def emit(event: dict[str, Any]) -> None:
    """Send an event to the launcher."""
    sys.stdout.write(f"{EVENT_PREFIX}{json.dumps(event)}\n")
    sys.stdout.flush()
