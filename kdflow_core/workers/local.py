"""Ranks as processes of this machine.

Each rank runs in a session of its own and holds the reading end of a pipe whose writing end only
the launcher has. The launcher's death, however violent, closes the pipe, and the rank ends its
whole process group: nothing is orphaned.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import psutil

from kdflow_core.anonymous_file import AnonymousFile
from kdflow_core.workers.base import STALL_S, Events, Launcher, Placement, RankContext, Start
from kdflow_core.workers.forking import ForkedProcess, ForkServers, can_fork
from kdflow_core.workers.group import RankGroup, RankProcess

LOOPBACK = "127.0.0.1"
STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
_SERVERS = ForkServers()


class LocalProcess:
    """A process of this machine, in a session of its own. See `RankProcess`."""

    where = lost = ""

    def __init__(self, process: "subprocess.Popen[str] | ForkedProcess") -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The number of the process, and of its group."""
        return self._process.pid

    def send(self, line: str) -> None:
        """See `RankProcess`."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit is reported later
            stdin.write(line + "\n")
            stdin.flush()

    def lines(self) -> Iterator[str]:
        """See `RankProcess`."""
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                yield line.rstrip("\n")

    def poll(self) -> int | None:
        """See `RankProcess`."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """See `RankProcess`."""
        return self._process.wait(timeout)

    def signal(self, number: signal.Signals) -> None:
        """See `RankProcess`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stands_still(self) -> str | None:
        """See `RankProcess`: where a signal has stopped it."""
        try:
            stopped = psutil.Process(self._process.pid).status() in STOPPED
        except psutil.NoSuchProcess:
            return None
        return "was stopped" if stopped else None

    def close(self) -> None:
        """See `RankProcess`."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


class LocalLauncher:
    """Ranks as processes of this machine, each in a session of its own.

    Where ranks can be forked, and `preload` names modules, they have loaded these when they start;
    see `forking`.
    """

    one_machine = True

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = preload if can_fork() else ()

    def warm(self, placement: Placement) -> None:
        """Have what ranks are forked from begin to load, and do not wait for it."""
        if self._preload:
            with contextlib.suppress(OSError):  # whoever starts ranks meets it again
                _SERVERS.warm(self._preload, rank_environment(placement, placement.num_ranks))

    def start(
        self,
        job: str,
        spec: str,
        placement: Placement,
        events: Events,
        *,
        stall_s: float = STALL_S,
    ) -> RankGroup:
        """See `Launcher`."""
        rendezvous = AnonymousFile("kdflow-rendezvous")
        group = RankGroup(placement.name, events, stall_s=stall_s, release=rendezvous.close)
        try:
            for number in range(placement.num_ranks):
                context = RankContext(
                    rank=number,
                    local_rank=number,
                    num_ranks=placement.num_ranks,
                    rendezvous=f"file://{rendezvous.path}",
                    address=LOOPBACK,
                )
                process = _start(job, number, placement, self._preload)
                group.add(process, Start(context=context, job=job, spec=spec))
        except BaseException:
            group.end()
            raise
        return group


def rank_environment(placement: Placement, ranks: int) -> dict[str, str]:
    """The environment of each of so many ranks on this machine: this process's, and what its
    placement adds.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {**placement.env, **os.environ} | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Progress is reported as events, and what is amiss as errors.
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def start_process(
    command: Sequence[str], env: Mapping[str, str], folder: str | None = None
) -> LocalProcess:
    """A process of this machine, in a working folder: by default that of this one."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        cwd=folder,
        start_new_session=True,
    )
    return LocalProcess(process)


def rank_command(job: str, number: int, placement: Placement) -> list[str]:
    """What starts a rank; its arguments are for people who look at processes."""
    return [sys.executable, "-m", "kdflow_core.workers.rank", job, placement.name, str(number)]


def _start(job: str, number: int, placement: Placement, preload: Sequence[str]) -> LocalProcess:
    env = rank_environment(placement, placement.num_ranks)
    command = rank_command(job, number, placement)
    if preload:
        # A server that cannot load the modules leaves it to the rank to say why.
        with contextlib.suppress(OSError):
            return LocalProcess(_SERVERS.fork(" ".join(command), preload, env))
    return start_process(command, env)


def _contract(launcher: LocalLauncher, process: LocalProcess) -> None:
    """Checked by mypy: what is here fits the contracts."""
    _launcher: Launcher = launcher
    _process: RankProcess = process
