"""Ranks as processes of this machine.

Each rank runs in a session of its own and holds the reading end of a pipe whose writing end only
the launcher has. The launcher's death, however violent, closes the pipe, and the rank ends its
whole process group: nothing is orphaned. A rank's death ends the other ranks, and so does one that
is stopped, or stuck with the others waiting for it: each tells every few seconds where it is.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import psutil

from kdflow_core.anonymous_file import AnonymousFile
from kdflow_core.errors import WorkerError
from kdflow_core.workers.rank_side import BEAT_S, EVENT_PREFIX

GRACE_S = 2.0
KEPT_LINES = 40
SILENT_S = 60.0  # a rank that has not beaten for so long is stopped, or starved
STALL_S = 1800.0


@dataclass
class _Rank:
    process: "subprocess.Popen[str]"
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    error: dict[str, Any] | None = None
    reader: threading.Thread | None = None
    heard: float = field(default_factory=time.monotonic)
    still_s: float | None = 0.0  # None: it waits for a request
    place: str = "its start"
    at_work: bool = True
    answers: deque[Any] = field(default_factory=deque)


def run_ranks(
    *,
    module: str,
    request: str,
    num_ranks: int,
    on_event: Callable[[dict[str, Any]], None],
    on_line: Callable[[int, str], None],
    env: Mapping[str, str] | None = None,
    name: str = "",
    stall_s: float = STALL_S,
    on_beat: Callable[[], None] | None = None,
) -> None:
    """Run `python -m module` as ranks, each with `request`, and wait for all of them to end.

    See `RankGroup`. Raises WorkerError.
    """
    with RankGroup(
        module=module,
        num_ranks=num_ranks,
        on_event=on_event,
        on_line=on_line,
        env=env,
        name=name or module,
        stall_s=stall_s,
        on_beat=on_beat,
    ) as group:
        group.send(request)
        group.wait()


class RankGroup:
    """`python -m module` as `num_ranks` ranks, which take requests, each a line of standard input.

    `on_event` gets the events that ranks emit, `on_line` every other line that a rank prints; both
    are called in the thread that waits. `env` adds to the environment what is not set there;
    `arguments` stand on the command line, for people who look at their processes; `name` is what
    messages call the group. When all ranks at work stand still for `stall_s` seconds, or one was
    stopped, the group ends; `on_beat` is called while ranks live. Used as a context manager, or
    closed. What raises WorkerError has ended all ranks.
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
        name: str = "",
        stall_s: float = STALL_S,
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        self._name = name or module
        self._stall_s = stall_s
        self._on_beat = on_beat
        self._checked = self._moved = time.monotonic()
        self._on_event = on_event
        self._on_line = on_line
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._rendezvous = AnonymousFile("kdflow-rendezvous")
        self._ranks: list[_Rank] = []
        try:
            for number in range(num_ranks):
                command = [sys.executable, "-m", "kdflow_core.workers.rank", module, *arguments]
                rank = _start(command, number, num_ranks, self._rendezvous.path, env or {})
                self._ranks.append(rank)
                rank.reader = threading.Thread(
                    target=_read, args=(number, rank, self._lines), daemon=True
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
        self._rendezvous.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> bool:
        """Take a line that a rank has printed; False when it has ended well instead."""
        number, line = self._next_line()
        rank = self._ranks[number]
        if line is None:
            code = rank.process.wait()
            if code != 0:
                self.close()
                raise _failure(f"rank {number} of {self._name}", rank, code)
            return False
        if not line.startswith(EVENT_PREFIX):
            rank.tail.append(line)
            self._on_line(number, line)
            return True
        event = _event(line)
        if event["event"] == "error":
            rank.error = event
        elif event["event"] == "answer":
            rank.answers.append(event["value"])
        else:
            self._on_event(event)
        return True

    def _next_line(self) -> tuple[int, str | None]:
        """The next line of any rank (None: its end), while none of them stands still."""
        while True:
            self._check_beats()
            try:
                return self._lines.get(timeout=BEAT_S)
            except queue.Empty:
                continue

    def _check_beats(self) -> None:
        """Raises WorkerError when a rank is stopped or stuck."""
        now = time.monotonic()
        if now - self._checked < BEAT_S:
            return
        asleep, self._checked = now - self._checked > 5 * BEAT_S, now
        if asleep:  # it was this process that was stopped, or not waiting
            self._moved = now
            for rank in self._ranks:
                rank.heard = now
            return
        still: dict[int, float] = {}
        for number, rank in enumerate(self._ranks):
            was_at_work, rank.at_work = rank.at_work, _is_at_work(rank)
            if not rank.at_work:
                if was_at_work:
                    self._moved = now  # it has done its share, for which others may have waited
                continue
            silent_s = now - rank.heard
            if silent_s > min(SILENT_S, self._stall_s) and _is_stopped(rank.process.pid):
                self._give_up(number, f"was stopped {silent_s:,.0f} s ago and does not go on")
            still[number] = max(silent_s, rank.still_s or 0.0)
            # While one moves, the others may well wait for it.
            self._moved = max(self._moved, now - still[number])
        if still and now - self._moved > self._stall_s:
            number = max(still, key=still.__getitem__)  # the others have come as far as they could
            what = f"has made no progress for {still[number]:,.0f} s; it stands at"
            self._give_up(number, f"{what} {self._ranks[number].place}")
        if self._on_beat is not None:
            self._on_beat()

    def _give_up(self, number: int, what: str) -> None:
        places = [f"rank {k}: {rank.place}" for k, rank in enumerate(self._ranks)]
        self.close()
        raise WorkerError(
            f"rank {number} of {self._name} {what}; all ranks were ended. What is done stays: run "
            "again, or raise stall_limit_s where so long a step is right",
            details="\n".join(places),
        )


def _is_at_work(rank: _Rank) -> bool:
    return rank.process.poll() is None and rank.still_s is not None


def _is_stopped(pid: int) -> bool:
    """Whether a process of this machine was stopped by a signal."""
    try:
        return bool(psutil.Process(pid).status() in STOPPED)
    except psutil.NoSuchProcess:
        return False


STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}


def _event(line: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line.removeprefix(EVENT_PREFIX))
    return event


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


def _read(number: int, rank: _Rank, lines: "queue.Queue[tuple[int, str | None]]") -> None:
    assert rank.process.stdout is not None
    with rank.process.stdout as stdout:
        for raw in stdout:
            line = raw.rstrip("\n")
            if line.startswith(BEAT):
                beat = _event(line)
                rank.heard, rank.still_s, rank.place = time.monotonic(), beat["still_s"], beat["at"]
            elif line:  # events begin with an empty one
                lines.put((number, line))
    lines.put((number, None))


BEAT = EVENT_PREFIX + '{"event": "beat"'


def _failure(who: str, rank: _Rank, code: int) -> WorkerError:
    if rank.error is not None:
        message, expected = rank.error["message"], rank.error["expected"]
        if expected:
            return WorkerError(message, expected=True)
        return WorkerError(f"{who} failed: {message}", details=rank.error["traceback"])
    cause = f"exit code {code}"
    if code < 0:
        cause = f"signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += " (if nobody sent it, the machine ran out of memory)"
    return WorkerError(f"{who} ended by {cause}", details="\n".join(rank.tail))


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
