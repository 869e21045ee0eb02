"""The processes of a run, for tests that kill them."""

import contextlib

import psutil


def stage_ranks(parent: psutil.Process) -> list[psutil.Process]:
    """The ranks that work for a stage below a process, by id; any child may end meanwhile."""
    ranks = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tasks.jobs.stage_host:StageHost" in child.cmdline():
                ranks.append(child)
    return sorted(ranks, key=lambda rank: rank.pid)
