"""The Prefect API that a run here and now talks to: the configured one, or one for itself."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from configs.errors import ConfigError, KdflowError

LOOPBACK = "127.0.0.1"
POLL_S = 0.05
OF_OUR_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    # What it says is about itself, and would come between the lines of the run.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}
START_S = 180.0  # a cold start on a busy machine
ANSWER_S = 5.0
STOP_S = 3.0
SEND_S = 10.0


class ServerError(KdflowError, RuntimeError):
    """Prefect's temporary server does not start."""


def configured_api() -> str | None:
    """The address of the API that a user has set up."""
    for name, value in OF_OUR_SERVER.items():
        os.environ.setdefault(name, value)
    from prefect.settings import PREFECT_API_URL  # noqa: PLC0415 - after the variables

    url: str | None = PREFECT_API_URL.value()
    return url


def load_prefect() -> None:
    """Load what a run needs of Prefect, which takes seconds."""
    configured = configured_api()  # sets the variables first
    import_module("flows.kd")
    if configured is None:
        import_module("prefect.server.api.server")


@contextmanager
def prefect_api(on_death: Callable[[str], None]) -> Iterator[None]:
    """Have an API to talk to. `on_death` is told, in another thread, when our own server ends
    before its time.

    Raises ConfigError when PREFECT_API_URL points to nothing, ServerError.
    """
    url = configured_api()
    from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: PLC0415 - loaded now

    if url is not None:
        require_answer(url)
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


def require_answer(url: str) -> None:
    """Raises ConfigError when no server answers there."""
    import httpx  # noqa: PLC0415 - not for `--help`

    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=ANSWER_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"PREFECT_API_URL={url} does not answer ({type(error).__name__}: {error}); start "
            "that server, or unset it (`prefect config unset PREFECT_API_URL`) for a temporary one"
        ) from error


class _TemporaryServer:
    """Prefect's API on loopback; its address within.

    A thread of this process, which has most of what it loads, and whose end is its end.
    """

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._ending = False
        self._failure = "it does not answer"

    def __enter__(self) -> str:
        import uvicorn  # noqa: PLC0415 - a run with a configured API needs neither
        from prefect.server.api.server import create_app  # noqa: PLC0415 - see above

        app = create_app(ephemeral=True, final=True)
        config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on")
        self._server = uvicorn.Server(config)
        listener = socket.create_server((LOOPBACK, 0))
        self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            self._thread.join(timeout=POLL_S)
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._ending = True
                raise ServerError(f"Prefect's temporary server does not start: {self._failure}")
        return f"http://{LOOPBACK}:{listener.getsockname()[1]}/api"

    def _serve(self, listener: socket.socket) -> None:
        try:
            self._server.run(sockets=[listener])
            self._failure = "it has stopped"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is told
            self._failure = f"{type(error).__name__}: {error}"
        if self._server.started and not self._ending:
            self._on_death(f"Prefect's temporary server has ended ({self._failure})")

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=STOP_S)
