"""A remote file system whose operations are tried again when they fail for a moment."""

from collections.abc import Callable
from typing import Any

import fsspec

from configs.patience import is_transient, patient
from configs.secrets import public
from storage.errors import StoreError

# What takes and gives whole values; a file that is open is its reader's.
OPERATIONS = frozenset(
    {
        "cat_file",
        "cat_ranges",
        "cp_file",
        "exists",
        "find",
        "get_file",
        "glob",
        "info",
        "isdir",
        "isfile",
        "ls",
        "makedirs",
        "open",
        "pipe_file",
        "put_file",
        "rm",
        "rm_file",
    }
)


# Whose errors have no base in common.
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google"}


class RemoteError(StoreError, OSError):
    """A remote file system that refuses or cannot be reached, perhaps only for now: a stage may be
    tried again.
    """

    def __init__(self, what: str, error: Exception) -> None:
        super().__init__(
            f"{what}: {type(error).__name__}: {error}; check the address, the credentials and the "
            "network"
        )
        self.expected = not is_transient(error)


class RemoteFileSystem:
    """An fsspec file system, patiently."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return _patiently(name, found) if name in OPERATIONS else found


def _patiently(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        first = str(arguments[0]) if arguments else ""
        what = f"{name} {public(first)}"
        try:
            return patient(what)(operation, *arguments, **options)
        except (FileNotFoundError, FileExistsError):
            raise  # an answer
        except Exception as error:
            known = type(error).__module__.partition(".")[0] in CLIENTS
            if not known and not isinstance(error, OSError):
                raise
            raise RemoteError(what, error) from error

    return call
