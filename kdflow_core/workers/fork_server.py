"""`python -m kdflow_core.workers.fork_server FD MODULE...`: bears ranks that have loaded MODULEs.

It loads the modules once, and then forks a rank for each request that comes through the socket FD,
after it has loaded what the request names beyond them; one without a rank is for that alone.
It never runs a thread of its own, and ends when the socket's other end is closed and the last of
its ranks is gone. See `kdflow_core.workers.forking` for the other side.
"""

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

import setproctitle

from kdflow_core.workers import rank

READY = b"R"
NUMBER = struct.Struct("q")  # a process's id when it is born, its exit code when it is gone
NUM_FDS = 3  # a rank's standard input, its standard output, and where its numbers go


def main(connection: socket.socket, modules: list[str]) -> None:
    """Serve until the launcher is gone, and all ranks are."""
    # It ends after its ranks, who may have something to save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["SPT_NOENV"] = "1"  # titles leave the environment as it is, for who looks there
    with _ending_with(connection):
        for module in modules:
            import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a rank then does not copy the pages of what is loaded
    connection.sendall(READY)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    ranks: dict[int, tuple[int, int]] = {}  # by the descriptor of its process: its id, its pipe
    open_for_more = True
    while open_for_more or ranks:
        for fd, _ in poll.poll():
            if fd in ranks:
                poll.unregister(fd)
                _tell_end(fd, *ranks.pop(fd))
            elif (request := _receive(connection)) is None:
                poll.unregister(connection)
                open_for_more = False
            else:
                words, fds = request
                _load_more(words["modules"])
                if not fds:
                    continue
                stdin, stdout, pipe = fds
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    for process, (_, others) in ranks.items():
                        os.close(process)
                        os.close(others)
                    _be_rank(words, stdin, stdout, pipe)
                os.close(stdin)
                os.close(stdout)
                process = os.pidfd_open(pid)
                ranks[process] = pid, pipe
                poll.register(process, select.POLLIN)


def _load_more(modules: list[str]) -> None:
    for module in modules:
        with contextlib.suppress(Exception):  # the rank meets it again, and says so
            import_module(module)


@contextlib.contextmanager
def _ending_with(connection: socket.socket) -> Iterator[None]:
    """Within, the launcher's end ends this process at once: nothing else comes through the socket
    yet, so that what SIGIO tells of is that.
    """
    flags = fcntl.fcntl(connection, fcntl.F_GETFL)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC)
    yield
    fcntl.fcntl(connection, fcntl.F_SETFL, flags)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """What was requested, and the descriptors of a rank if there is one; None at the end."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, NUM_FDS)
    while data and not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        data = data + more if more else b""
    if not data:
        return None
    requests = [json.loads(line) for line in data.splitlines()]  # the rank's is the last
    modules = [module for request in requests for module in request["modules"]]
    return requests[-1] | {"modules": modules}, fds


def _tell_end(process: int, pid: int, pipe: int) -> None:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the launcher is gone
        os.write(pipe, NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os.close(pipe)
    os.close(process)


def _be_rank(request: dict[str, Any], stdin: int, stdout: int, pipe: int) -> NoReturn:
    """Become what a rank is that the launcher has started afresh."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for source, target in ((stdin, 0), (stdout, 1), (stdout, 2)):
            os.dup2(source, target)
        os.close(stdin)
        os.close(stdout)
        setproctitle.setproctitle(request["title"])
        os.environ.clear()
        os.environ.update(request["env"])
        _take_threads()
        os.write(pipe, NUMBER.pack(os.getpid()))
        os.close(pipe)
        rank.run()
    finally:
        os._exit(1)  # whatever happens, there is one server


def _take_threads() -> None:
    """As many threads as the environment says; the libraries were loaded under another."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
