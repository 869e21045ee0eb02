"""The Prefect API that a run here and now talks to: the configured one, or one for itself."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import httpx

from configs.errors import ConfigError, KdflowError
from kdflow_core.workers.ports import free_port

START_S = 180.0  # a cold start on a busy machine
ANSWER_S = 5.0
STOP_S = 3.0
SEND_S = 10.0


class ServerError(KdflowError, RuntimeError):
    """Prefect's temporary server does not start."""


@contextmanager
def prefect_api(on_death: Callable[[str], None]) -> Iterator[None]:
    """Have an API to talk to. `on_death` is told, in a thread of its own, when our own server ends
    before its time.

    Raises ConfigError when PREFECT_API_URL points to nothing, ServerError.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415 - after that

    url = PREFECT_API_URL.value()
    if url is not None:
        _check(url)
        yield
        return
    with _TemporaryServer(on_death) as url:
        # For what is set up in other threads, too.
        os.environ["PREFECT_API_URL"] = url
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                try:
                    yield
                finally:
                    if sys.exc_info()[0] is not KeyboardInterrupt:
                        _send_what_waits()
        finally:
            del os.environ["PREFECT_API_URL"]


def _send_what_waits() -> None:
    """Send the logs and events that Prefect holds back: after the run, nobody receives them."""
    from prefect.events.worker import EventsWorker  # noqa: PLC0415 - see above
    from prefect.logging.handlers import APILogWorker  # noqa: PLC0415 - see above

    for service in (APILogWorker, EventsWorker):
        service.drain_all(timeout=SEND_S)


def _check(url: str) -> None:
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=ANSWER_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"PREFECT_API_URL={url} does not answer ({type(error).__name__}: {error}); start "
            "that server, or unset it (`prefect config unset PREFECT_API_URL`) for a temporary one"
        ) from error


class _TemporaryServer:
    """A server process; its address within."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._ending = threading.Event()

    def __enter__(self) -> str:
        deadline = time.monotonic() + START_S
        while True:
            url = self._start(deadline)
            if url is not None:
                threading.Thread(target=self._watch, daemon=True).start()
                return url

    def _start(self, deadline: float) -> str | None:
        """The server's process; None when another process has taken the port meanwhile."""
        port = free_port()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the server writes to it until it ends
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.temporary_server", str(port)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PREFECT_UI_ENABLED": "0"},
            start_new_session=True,
        )
        try:
            while not _is_healthy(port):
                time.sleep(0.1)
                text = _tail(log)
                if self._process.poll() is not None:
                    if "address already in use" in text:
                        return None
                    raise ServerError(f"Prefect's temporary server does not start:\n{text}")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"Prefect's temporary server does not answer after {START_S:.0f} s:\n{text}"
                    )
        except BaseException:
            self._end()
            raise
        return f"http://127.0.0.1:{port}/api"

    def _watch(self) -> None:
        code = self._process.wait()
        if not self._ending.is_set():
            self._on_death(f"Prefect's temporary server has ended (exit code {code})")

    def _end(self) -> None:
        self._ending.set()
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(self, *_: object) -> None:
        self._end()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=ANSWER_S).is_success
    except httpx.TransportError:
        return False


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return log.read().decode(errors="replace")
