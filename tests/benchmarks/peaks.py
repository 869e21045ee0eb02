"""The memory of processes that are measured from outside, as ranks are."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

# Looking costs a part of one core. `smaps` would be exact for what processes share, but holds up
# the page faults of the process that it is about, which took half as long again for a step.
EVERY_S = 0.2


@contextlib.contextmanager
def watched_peaks(title: str = "", *, field: str = "RssAnon") -> Iterator[dict[int, int]]:
    """Within, the processes below this one are watched, those with `title` in their command: the
    most anonymous memory that each of them has had, in bytes, by its id. What a process shares
    with the one that it was forked from counts; files that are mapped, as those of weights and
    states, do not. The `field` VmHWM is the kernel's own mark, which misses no peak between two
    looks, and counts mapped files.
    """
    line = re.compile(rf"^{field}:\s+(\d+) kB", re.MULTILINE)
    root, peaks, done = psutil.Process(), dict[int, int](), threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            for process in root.children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):  # it may be gone
                    if title in " ".join(process.cmdline()):
                        now = _bytes(process.pid, line)
                        peaks[process.pid] = max(now, peaks.get(process.pid, 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def _bytes(pid: int, line: re.Pattern[str]) -> int:
    found = line.search(Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0  # a process that has ended has no memory
