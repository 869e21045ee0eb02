"""Fingerprints of what a run reads from outside the store: data files and model folders.

Local files are fingerprinted by content (XXH3-128), memoized by path, size, times and inode; remote
ones by what their file system reports (an ETag, or size and time).
"""

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from configs.secrets import public
from storage.digest import digest, hash_file
from storage.errors import StoreError
from storage.listing import file_system, list_files
from storage.memo import Memo

MEMO = "fingerprints.sqlite"


def file_state(path: str | os.PathLike[str]) -> str:
    """What changes when a local file does: its place, size, times and inode. Unlike the content's
    time, the time at which the inode changed cannot be set back.
    """
    stat = os.stat(path)
    times = f"{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    return f"{os.path.realpath(path)}|{stat.st_size}|{times}|{stat.st_ino}"


class Fingerprints:
    """Content fingerprints, remembered in `scratch`."""

    def __init__(self, scratch: str | Path) -> None:
        self._memo = Memo(Path(scratch) / MEMO)

    def files(self, pattern: str) -> dict[str, str]:
        """Base name -> fingerprint of every file that a path, glob, folder or URL names.

        Raises DataFileError when nothing matches.
        """
        fs, _ = file_system(pattern)
        paths = list_files(pattern)
        start = len(os.path.commonpath([os.path.dirname(public(p)) for p in paths]))
        return {public(p)[start:].lstrip("/"): self._one(fs, p) for p in paths}

    def file(self, path: Path) -> str:
        """The fingerprint of a local file."""
        return self._one(LocalFileSystem(), str(path))

    def _one(self, fs: Any, path: str) -> str:
        if not isinstance(fs, LocalFileSystem):
            info = fs.info(path)
            marks = {
                key: str(info.get(key)) for key in ("ETag", "etag", "size", "created", "mtime")
            }
            return digest(marks)
        state = file_state(path)
        known = self._memo.get(state)
        if known is None:
            try:
                known = hash_file(Path(path))
            except FileNotFoundError:
                raise
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error.strerror}") from error
            self._memo.put(state, known)
        return known
