"""What a path, glob, folder or URL names.

Paths are taken literally where a file of that name exists, and as globs only where none does.
"""

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from configs.secrets import public
from storage.errors import StoreError
from storage.remote import RemoteFileSystem


class DataFileError(StoreError, OSError):
    """A data file that cannot be read; the message names it."""


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it. Raises DataFileError where there is
    none for it.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataFileError(f"there is no file system for '{url}': {error}") from error
    return (fs if isinstance(fs, LocalFileSystem) else RemoteFileSystem(fs)), path


def list_files(pattern: str) -> list[str]:
    """The files that a path, glob, folder or URL names, sorted, as the file system's paths.

    Raises DataFileError when there is none, or one is no regular file (a FIFO would hang).
    """
    fs, path = file_system(pattern)
    if fs.isdir(path):
        found = sorted(fs.find(path))
    elif fs.exists(path):
        if not fs.isfile(path):
            raise DataFileError(f"{path} is not a regular file; give one, or a folder of them")
        found = [path]
    elif any(sign in public(path) for sign in "*?["):  # in a query, they are no pattern
        found = sorted(p for p in fs.glob(path) if fs.isfile(p))
    else:
        found = []
    if not found:
        raise DataFileError(
            f"no file at '{pattern}'; check the path (relative ones start at the "
            "recipe's folder, or at the current one when given as an override)"
        )
    return found
