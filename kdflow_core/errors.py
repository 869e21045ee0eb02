"""Errors that a user can act on. The message says what was given, what is allowed, what to do."""

from configs.errors import KdflowError as KdflowError
from configs.secrets import public


class DataError(KdflowError, ValueError):
    """The data cannot be used."""


class ModelError(KdflowError, ValueError):
    """A model cannot be used as asked."""


class AlignmentError(KdflowError, ValueError):
    """Teacher states and student tokens do not belong together."""


class TrainingError(KdflowError, RuntimeError):
    """Training cannot go on."""


class StoppedError(KdflowError, RuntimeError):
    """Work ends because somebody has asked for it; what was done is saved."""


class WorkerError(KdflowError, RuntimeError):
    """A worker process failed. `expected` says that the message alone is meant for the user;
    otherwise `details` holds a traceback or the worker's last output.
    """

    def __init__(self, message: str, *, expected: bool = False, details: str = "") -> None:
        super().__init__(message)
        self.expected = expected
        self.details = public(details)
