"""A group of ranks, wherever its processes are.

A rank's death ends the other ranks, and so does one that is stopped, or stuck with the others
waiting for it: each tells every few seconds where it is.
"""

import json
import queue
import signal
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Events, Request, Start, WorkerGroup
from kdflow_core.workers.rank_side import BEAT_S, EVENT_PREFIX

GRACE_S = 2.0
POLL_S = 0.05
KEPT_LINES = 40
SILENT_S = 60.0  # a rank that has not beaten for so long is stopped, or starved
_GROUPS: "weakref.WeakSet[RankGroup]" = weakref.WeakSet()


class RankProcess(Protocol):
    """The process of a rank. `where` it runs, for messages, and how it was `lost`, if nobody can
    say how it ended.
    """

    where: str
    lost: str

    def send(self, line: str) -> None:
        """Give it a line of standard input; nothing happens when it has ended."""
        ...

    def lines(self) -> Iterator[str]:
        """What it prints, until it has ended, or is lost."""
        ...

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises TimeoutExpired after `timeout` seconds."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it has started, if it is still there."""
        ...

    def stands_still(self) -> str | None:
        """Why nothing is heard from it, if that is not for want of time."""
        ...

    def close(self) -> None:
        """Let go of it, once it has ended."""
        ...


@dataclass
class _Rank:
    process: RankProcess
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    error: dict[str, Any] | None = None
    reader: threading.Thread | None = None
    heard: float = field(default_factory=time.monotonic)
    still_s: float | None = 0.0  # None: it waits for a request
    place: str = "its start"
    at_work: bool = True
    stoppable: bool = False
    replies: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pending:
    """A call that was made. See `Pending`."""

    group: "RankGroup"
    number: int

    def replies(self) -> list[Any]:
        """See `Pending`."""
        return self.group.replies(self.number)


def save_ranks(seconds: float) -> bool:
    """Have the ranks of all groups of this process save what is done, and end, which may take so
    many seconds; False at once where none of them can now.
    """
    saving = [group for group in list(_GROUPS) if group.ask_to_stop()]
    deadline = time.monotonic() + seconds
    while any(group.is_running() for group in saving) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return bool(saving)


class RankGroup:
    """See `WorkerGroup`. Ranks take their calls as lines of standard input."""

    def __init__(
        self,
        name: str,
        events: Events,
        *,
        stall_s: float,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Of no rank yet; `release` is called when the last one has ended, and may be again."""
        self._name = name
        self._events = events
        self._stall_s = stall_s
        self._release = release
        self._checked = self._moved = time.monotonic()
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._ranks: list[_Rank] = []
        self._calls = 0
        _GROUPS.add(self)

    def add(self, process: RankProcess, start: Start) -> None:
        """Have the process be the next rank."""
        rank = _Rank(process)
        self._ranks.append(rank)
        _watch(start.context.rank, rank, self._lines)
        process.send(start.model_dump_json())

    def call(self, method: str, **arguments: Any) -> "_Pending":
        """See `WorkerGroup`."""
        self._require_ranks()
        self._calls += 1
        request = Request(number=self._calls, method=method, arguments=arguments)
        for rank in self._ranks:
            rank.process.send(request.model_dump_json())
        return _Pending(self, self._calls)

    def replies(self, number: int) -> list[Any]:
        """Wait for all ranks' replies to a call. Raises WorkerError."""
        self._require_ranks()
        while not all(number in rank.replies for rank in self._ranks):
            if not self._take():
                self.end()
                raise WorkerError(f"a rank of {self._name} left without a reply")
        return [rank.replies.pop(number) for rank in self._ranks]

    def _require_ranks(self) -> None:
        if not self._ranks:
            raise WorkerError(f"{self._name} has ended; it takes no more calls")

    def ask_to_stop(self) -> bool:
        """Ask the ranks to save what is done, and to end; False where none of them can now."""
        can = any(rank.stoppable for rank in self._ranks)
        for rank in self._ranks if can else ():
            rank.process.send(Request(role="stop").model_dump_json())
        return can

    def is_running(self) -> bool:
        """Whether a rank has not ended."""
        return any(rank.process.poll() is None for rank in self._ranks)

    def close(self) -> None:
        """See `WorkerGroup`. Raises WorkerError when a rank fails on its way out."""
        if not self._ranks:
            return
        running = len(self._ranks)
        for rank in self._ranks:
            rank.process.send(Request(role="leave").model_dump_json())
        while running:
            running -= not self._take()
        self.end()

    def end(self) -> None:
        """See `WorkerGroup`."""
        _end(self._ranks)
        self._ranks = []
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.end()

    def _take(self) -> bool:
        """Take a line that a rank has printed; False when it has ended well instead."""
        number, line = self._next_line()
        rank = self._ranks[number]
        if line is None:
            code = rank.process.wait()
            if code != 0 or rank.process.lost:
                self.end()
                raise _failure(f"rank {number} of {self._name}", rank, code)
            return False
        if not line.startswith(EVENT_PREFIX):
            rank.tail.append(line)
            self._events.line(number, line)
            return True
        event = _event(line)
        if event["event"] == "error":
            rank.error = event
        elif event["event"] == "stoppable":
            rank.stoppable = event["value"]
        elif event["event"] == "reply":
            rank.replies[event["number"]] = event["value"]
        else:
            self._events.event(event)
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
            if silent_s > min(SILENT_S, self._stall_s) and (why := rank.process.stands_still()):
                self._give_up(number, f"{why} {silent_s:,.0f} s ago and does not go on")
            still[number] = max(silent_s, rank.still_s or 0.0)
            # While one moves, the others may well wait for it.
            self._moved = max(self._moved, now - still[number])
        if still and now - self._moved > self._stall_s:
            number = max(still, key=still.__getitem__)  # the others have come as far as they could
            what = f"has made no progress for {still[number]:,.0f} s; it stands at"
            self._give_up(number, f"{what} {self._ranks[number].place}")
        self._events.beat()

    def _give_up(self, number: int, what: str) -> None:
        places = [f"rank {k}: {rank.place}" for k, rank in enumerate(self._ranks)]
        self.end()
        raise WorkerError(
            f"rank {number} of {self._name} {what}; all ranks were ended. What is done stays: run "
            "again, or raise stall_limit_s where so long a step is right",
            details="\n".join(places),
        )


def _is_at_work(rank: _Rank) -> bool:
    return rank.process.poll() is None and rank.still_s is not None


def _event(line: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line.removeprefix(EVENT_PREFIX))
    return event


def _watch(number: int, rank: _Rank, lines: "queue.Queue[tuple[int, str | None]]") -> None:
    rank.reader = threading.Thread(target=_read, args=(number, rank, lines), daemon=True)
    rank.reader.start()


def _read(number: int, rank: _Rank, lines: "queue.Queue[tuple[int, str | None]]") -> None:
    for line in rank.process.lines():
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
    where, details = rank.process.where, "\n".join(rank.tail)
    if rank.process.lost:
        return WorkerError(f"{who}{where} is lost: {rank.process.lost}", details=details)
    cause = f"exit code {code}"
    if code < 0:
        cause = f"signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += " (if nobody sent it, the machine ran out of memory)"
    return WorkerError(f"{who}{where} ended by {cause}", details=details)


def _end(ranks: list[_Rank]) -> None:
    """TERM, grace, KILL, for every process group that is still there; KILL for one that a TERM
    would have save first.
    """
    there = [rank for rank in ranks if rank.process.poll() is None]
    for rank in there:
        rank.process.signal(signal.SIGKILL if rank.stoppable else signal.SIGTERM)
    alive = [rank.process for rank in there]
    deadline = time.monotonic() + GRACE_S
    for process in alive:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.signal(signal.SIGKILL)
            process.wait()
    for rank in ranks:
        rank.process.close()
        if rank.reader is not None:
            rank.reader.join(timeout=GRACE_S)


def _contract(group: RankGroup) -> None:
    """Checked by mypy: what is here fits the contract."""
    _group: WorkerGroup = group
