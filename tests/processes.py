"""The processes of a run, for tests that kill them."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

RANK = "kdflow_core.workers.rank"
FORK_SERVER = "kdflow_core.workers.fork_server"
PATIENCE_S = 600.0  # what comes at all has come by then, on a slow and busy machine, too


def run_ranks(main: Callable[..., None], *arguments: object, ranks: int) -> None:
    """`main(rank, *arguments)` in processes of their own. Raises what one of them raises."""
    import torch.multiprocessing as mp

    mp.start_processes(main, arguments, nprocs=ranks, start_method="forkserver")


def is_rank(process: psutil.Process, job: str = "") -> bool:
    """Whether a process is a rank, of a job whose name has `job` in it."""
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline()).split()  # a forked rank has one title
        return RANK in words and any(job in word for word in words)
    return False


def orphaned_ranks() -> list[psutil.Process]:
    """The ranks whose launcher, the parent of their fork server if they have one, is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent is not None and FORK_SERVER in parent.cmdline():
                parent = parent.parent()
            if is_rank(process) and (parent is None or parent.pid in {1, os.getpid()}):
                found.append(process)
    return found


def stage_ranks(parent: psutil.Process) -> list[psutil.Process]:
    """The ranks that work for a stage below a process, by id."""
    named = {
        child.pid: child
        for child in parent.children(recursive=True)
        if is_rank(child, "tasks.jobs.stage_host:StageHost")
    }
    # What a rank starts has its name until it runs a program of its own.
    return [named[pid] for pid in sorted(named) if named[pid].ppid() not in named]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 15
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its group"
        time.sleep(0.05)


def kill_a_rank_when(happened: Callable[[], bool], victim: int = -1) -> None:
    """Wait for something, then SIGKILL one of the ranks of this process's stage."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    stage_ranks(psutil.Process())[victim].kill()
