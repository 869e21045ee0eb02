"""Retries for what may pass by itself: a server, object store or hub that is briefly away."""

import errno
import logging
from collections.abc import Callable

import tenacity

from configs.secrets import public

ATTEMPTS = 5
LONGEST_WAIT_S = 8.0
STATUSES = {408, 425, 429, 500, 502, 503, 504}
ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux; s3fs has it for a 500
}
# Of httpx, aiohttp and botocore, none of which is needed here.
NAMES = {"TransportError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError"}
PERMANENT_NAMES = {"UnsupportedProtocol", "ReadTimeout", "ClientConnectorCertificateError"}

log = logging.getLogger("kdflow")


def is_transient(error: BaseException) -> bool:
    """Whether a second attempt may succeed: by status, error number or kind of connection error."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", getattr(error, "status", None))
    if isinstance(status, int) and status >= 400:
        return status in STATUSES
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & PERMANENT_NAMES:
        return False
    if names & NAMES or isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in ERRNOS


def patient(
    what: str,
    *,
    attempts: int = ATTEMPTS,
    transient: Callable[[BaseException], bool] = is_transient,
) -> tenacity.Retrying:
    """Calls a function again while its error is transient, a few times, ever later; says so once.
    In the end the last error is raised. Other errors are raised at once.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            name, text = type(error).__name__, public(str(error))
            log.warning("%s: %s: %s; trying again", what, name, text)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(transient),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=LONGEST_WAIT_S, jitter=0.5),
        before_sleep=tell,
        reraise=True,
    )
