"""Which process of which machine: a mark that other processes can tell alive from gone."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

# Of /proc/<pid>/stat behind the name: proc(5) counts them from 3.
STATE, START_TICKS = 0, 19
DEAD = {"Z", "X", "x"}


def mark_of_this_process() -> dict[str, str | int]:
    """A mark of this process, as plain JSON."""
    pid = os.getpid()
    started = _started(pid)
    return {
        "host": os.uname().nodename,
        "place": _place(),
        "pid": pid,
        "started": started or "",
    }


def is_gone(mark: Mapping[str, Any]) -> bool:
    """Whether a mark is of a process of this machine, and that process is no more.

    Of another machine's nothing is known here: False.
    """
    pid, started = mark.get("pid"), mark.get("started")
    if mark.get("place") != _place() or not isinstance(pid, int) or pid <= 0:
        return False
    return _started(pid) != started


def _started(pid: int) -> str | None:
    """When a process started, by a clock that cannot be set; None when it is gone.

    psutil's `create_time` adds the time of the boot, which moves with the system's clock.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[STATE] in DEAD else fields[START_TICKS]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # not on Linux, where the kernel keeps the time itself
        process = psutil.Process(pid)
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else f"{process.create_time():.6f}"
    except psutil.NoSuchProcess:
        return None


def _place() -> str:
    """What must be equal for a process id to mean the same process: boot and pid name space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode()}"
