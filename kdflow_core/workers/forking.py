"""Ranks that start in a moment, forked from a process that has loaded what they need.

A fresh rank spends seconds on loading libraries, more than many a stage works on a small model. A
fork server does it once for all ranks of one environment; see `fork_server`. It is for machines
without accelerators: whatever their drivers were asked before a fork is lost in the child, and
beside their stages the seconds do not count.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from kdflow_core.workers.fork_server import NUMBER, READY
from kdflow_core.workers.rank_side import ROOT

START_S = 120.0  # a server that takes longer to load is not waited for
SOURCES = ("configs", "kdflow_core", "storage", "tasks")
MOST_SERVERS = 3  # of one launcher; each holds the libraries once
# Where drivers put their devices: NVIDIA, AMD, NVIDIA under Windows.
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# Variables that change within a process that launches, or from rank to rank, and that nothing reads
# while it is loaded; or that a forked rank has set for itself (`fork_server`).
NO_MATTER = ("AWS_", "PREFECT_", "PYTEST_CURRENT_TEST", "OMP_NUM_THREADS", "PYTHONWARNINGS")


def can_fork() -> bool:
    """Whether ranks of this machine may be forked."""
    return sys.platform == "linux" and not has_accelerator()


def has_accelerator() -> bool:
    """Whether a driver has put devices here. Loads nothing to find out."""
    return any(Path(device).exists() for device in DEVICES)


class ForkedProcess:
    """A process that a server has forked; as much of `subprocess.Popen` as a launcher needs."""

    def __init__(self, pid: int, stdin: TextIO, stdout: TextIO, end: int) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self._end: int | None = end  # the exit code comes here
        self._code: int | None = None
        self._ending = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises TimeoutExpired after `timeout` seconds."""
        with self._ending:
            if self._end is not None:
                arrival = select.poll()
                arrival.register(self._end, select.POLLIN)
                if not arrival.poll(None if timeout is None else 1000 * timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
                told = os.read(self._end, NUMBER.size)
                # Without a word it was the server that was killed; the process loses its input.
                self._code = NUMBER.unpack(told)[0] if told else -9
                os.close(self._end)
                self._end = None
        assert self._code is not None
        return self._code


class _Server:
    """A fork server, which loads `modules`. Raises OSError when it cannot be had."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._loaded = set(modules)
        self._requests, theirs = socket.socketpair()
        with theirs:
            words = ["-m", "kdflow_core.workers.fork_server", str(theirs.fileno()), *modules]
            self._process = subprocess.Popen(
                [sys.executable, *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        self.was_ready = False

    def _wait_until_it_is_ready(self) -> None:
        self._requests.settimeout(START_S)
        self.was_ready = self._requests.recv(len(READY)) == READY
        self._requests.settimeout(None)
        if not self.was_ready:
            raise ConnectionError("the fork server did not start")

    def load(self, modules: Sequence[str]) -> None:
        """Have it load what it lacks of `modules`, and do not wait for it. Raises OSError."""
        if self.was_ready and (lacking := self._lacking(modules)):  # else its next rank asks for it
            self._requests.sendall((json.dumps({"modules": lacking}) + "\n").encode())

    def _lacking(self, modules: Sequence[str]) -> list[str]:
        lacking = [module for module in modules if module not in self._loaded]
        self._loaded.update(lacking)
        return lacking

    def fork(self, title: str, modules: Sequence[str], env: Mapping[str, str]) -> ForkedProcess:
        """A process that is a rank and has loaded `modules`. Raises OSError."""
        if not self.was_ready:
            self._wait_until_it_is_ready()
        words = {"title": title, "modules": self._lacking(modules), "env": dict(env)}
        request = json.dumps(words) + "\n"
        their_stdin, stdin = os.pipe()
        stdout, their_stdout = os.pipe()
        end, their_end = os.pipe()
        theirs = [their_stdin, their_stdout, their_end]
        with contextlib.suppress(OSError):  # it has ended, which is seen below
            first = socket.send_fds(self._requests, [request.encode()], theirs)
            self._requests.sendall(request.encode()[first:])
        for fd in theirs:
            os.close(fd)
        born = os.read(end, NUMBER.size)
        if not born:
            for fd in (stdin, stdout, end):
                os.close(fd)
            raise ConnectionError("the fork server has ended")
        files = os.fdopen(stdin, "w"), os.fdopen(stdout, errors="replace")
        return ForkedProcess(NUMBER.unpack(born)[0], *files, end)

    def close(self, *, reap: bool = True) -> None:
        """Take no more requests. It ends after its ranks; `reap` waits for that, in a thread, which
        cannot be had where this process ends.
        """
        self._requests.close()
        if reap:
            threading.Thread(target=self._process.wait, daemon=True).start()


def _code_changed() -> int:
    """When our code last changed, in nanoseconds: who edits it between two runs of one process,
    in a notebook say, gets ranks with the new one.
    """
    files = (file for package in SOURCES for file in (ROOT / package).rglob("*.py"))
    return max(file.stat().st_mtime_ns for file in files)


def _key(env: Mapping[str, str]) -> str:
    """What tells servers apart: ranks of one key can be forked from one of them."""
    read = {name: value for name, value in env.items() if not name.startswith(NO_MATTER)}
    return json.dumps([os.getcwd(), sorted(read.items()), _code_changed()])


class ForkServers:
    """The fork servers of this process, one for each environment that ranks are to have."""

    def __init__(self) -> None:
        self._servers: dict[str, _Server] = {}
        self._failed: set[str] = set()
        self._lock = threading.Lock()
        atexit.register(self.close)

    def fork(self, title: str, modules: Sequence[str], env: Mapping[str, str]) -> ForkedProcess:
        """A process that is a rank and has loaded `modules`. Raises OSError when there is none."""
        key = _key(env)
        with self._lock:
            server = self._taken(key, modules, env)
            try:
                process = server.fork(title, modules, env)
            except BaseException as error:
                server.close()
                if isinstance(error, OSError) and not server.was_ready:
                    self._failed.add(key)
                raise
            self._keep(key, server)
        return process

    def warm(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        """Have a server begin to load `modules`, and do not wait for it. Raises OSError."""
        key = _key(env)
        with self._lock:
            server = self._taken(key, modules, env)
            server.load(modules)
            self._keep(key, server)

    def _taken(self, key: str, modules: Sequence[str], env: Mapping[str, str]) -> _Server:
        if key in self._failed:
            raise ConnectionError("the fork server of this environment does not start")
        return self._servers.pop(key, None) or _Server(modules, env)

    def _keep(self, key: str, server: _Server) -> None:
        self._servers[key] = server  # the one that was used last is the last
        while len(self._servers) > MOST_SERVERS:
            self._servers.pop(next(iter(self._servers))).close()

    def close(self) -> None:
        """Where this process ends: end all servers, each after its ranks."""
        with self._lock:
            for server in self._servers.values():
                server.close(reap=False)
            self._servers.clear()
