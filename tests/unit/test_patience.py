"""What may pass is tried again, a few times, and told once; what will not is raised at once."""

import errno
import logging
from collections.abc import Callable

import aiohttp
import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from configs import patience
from configs.patience import ATTEMPTS, is_transient, patient


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.0)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://h"))


def of_status(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("x", request=response(status).request, response=response(status))


TRANSIENT = [
    ConnectionResetError(),
    TimeoutError(),
    OSError(errno.EBUSY, "SlowDown"),
    OSError(errno.EREMOTEIO, "InternalError"),
    httpx.ConnectError("refused"),
    httpx.RemoteProtocolError("cut"),
    aiohttp.ServerDisconnectedError(),
    of_status(503),
    of_status(429),
    HfHubHTTPError("x", response=response(502)),
]
PERMANENT = [
    PermissionError(errno.EACCES, "no"),
    FileNotFoundError("gone"),
    FileExistsError("there"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EINVAL, "InvalidBucketName"),
    httpx.UnsupportedProtocol("x"),
    of_status(401),
    of_status(404),
    HfHubHTTPError("x", response=response(403)),
    ValueError("x"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_permanent(error: Exception) -> None:
    assert not is_transient(error)


def failing(errors: list[Exception]) -> Callable[[], str]:
    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return call


def test_it_goes_on_after_some_failures_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert patient("the store")(failing([ConnectionResetError()] * (ATTEMPTS - 1))) == "done"
    assert caplog.text.count("the store") == 1


def test_it_does_not_go_on_for_ever() -> None:
    left: list[Exception] = [ConnectionResetError()] * 100
    with pytest.raises(ConnectionResetError):
        patient("x")(failing(left))
    assert len(left) == 100 - ATTEMPTS


def test_what_will_not_pass_is_raised_at_once() -> None:
    left: list[Exception] = [PermissionError(), PermissionError()]
    with pytest.raises(PermissionError):
        patient("x")(failing(left))
    assert len(left) == 1
