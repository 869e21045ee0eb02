"""A command in a real terminal of its own, with a person who presses Ctrl-C."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.processes import PATIENCE_S
from tests.readme import ROOT

CTRL_C = b"\x03"


class Terminal:
    """`kdflow` with arguments, in the foreground of a pseudo-terminal."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.output = ""
        command = [sys.executable, "-m", "flows", *arguments]
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            # As a shell starts a command, even where these tests run in the background.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, os.environ | {"COLUMNS": "200"} | dict(env or {}))
        self._seen: set[psutil.Process] = set()

    def _read(self, timeout: float) -> bool:
        """Take what has been printed; False at its end."""
        if not select.select([self._fd], [], [], timeout)[0]:
            return True
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:  # Linux's way of saying that nobody holds the terminal any more
            return False
        self.output += chunk.decode(errors="replace")
        return bool(chunk)

    def wait_for(self, pattern: str, timeout: float = PATIENCE_S) -> None:
        """Until something is printed."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline, self.output
            assert self._read(0.2), self.output

    def wait_for_library(self, name: str) -> None:
        """Until a process that the command has started has begun to load something."""
        deadline, command = time.monotonic() + 60, psutil.Process(self.pid)
        while not any(
            name in (Path(f"/proc/{child.pid}") / "maps").read_text()
            for child in command.children()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def press(self, key: bytes) -> None:
        """A key, which reaches the whole foreground group."""
        self._seen = set(psutil.Process(self.pid).children(recursive=True))
        os.write(self._fd, key)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Until it has ended; its exit code (negative: the signal)."""
        deadline = time.monotonic() + timeout
        while self._read(0.05):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it did not end:\n{self.output}")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def left_behind(self, within_s: float = 3.0) -> list[psutil.Process]:
        """Processes that it had when a key was pressed, and that are still there."""
        _, alive = psutil.wait_procs(self._seen, timeout=within_s)
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def seconds_to_the_prompt(terminal: Terminal) -> float:
    """From a Ctrl-C to the end of the command."""
    began = time.monotonic()
    terminal.press(CTRL_C)
    code = terminal.wait(60)
    seconds = time.monotonic() - began
    assert code == 130, terminal.output
    return seconds


def fresh_home(folder: Path) -> dict[str, str]:
    """An environment without anybody's Prefect server."""
    kept = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    return kept | {"PREFECT_HOME": str(folder / "prefect")}
