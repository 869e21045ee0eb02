"""The memory of processes that are measured from outside, as ranks are."""

import contextlib
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 0.05
ANONYMOUS = re.compile(r"^Pss_Anon:\s+(\d+) kB", re.MULTILINE)


class PeakOfProcesses:
    """While it is entered, watches the processes below one (this one): the most anonymous memory
    that any of them had, in bytes. What processes share counts in parts; files that are mapped, as
    those of weights and states, do not count.
    """

    def __init__(self, pid: int | None = None, *, title: str = "") -> None:
        self._root = psutil.Process(pid)
        self._title = title  # only processes with it in their command count
        self.by_process: dict[int, int] = {}
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def bytes(self) -> int:
        """That of the process with the most."""
        return max(self.by_process.values(), default=0)

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            with contextlib.suppress(psutil.Error):
                for process in self._root.children(recursive=True):
                    self._look_at(process)

    def _look_at(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error, OSError):  # it may be gone
            if self._title not in " ".join(process.cmdline()):
                return
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            if found := ANONYMOUS.search(rollup):
                now = 1024 * int(found[1])
                self.by_process[process.pid] = max(now, self.by_process.get(process.pid, 0))

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._watcher.join()
