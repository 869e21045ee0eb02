"""Fingerprints of what a run reads from outside the store: data files and model folders.

Local files are fingerprinted by content (XXH3-128), memoized by path, size and modification time;
remote ones by what their file system reports (an ETag, or size and time).
"""

import json
import os
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.data_files import list_files
from storage.digest import digest, hash_file


def file_state(path: str | os.PathLike[str]) -> str:
    """What changes when a local file does: its place, size, modification time and inode."""
    stat = os.stat(path)
    return f"{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"


class Fingerprints:
    """Content fingerprints with a memo file in `scratch`."""

    def __init__(self, scratch: str) -> None:
        self._memo_path = Path(scratch) / "fingerprints.json"
        try:
            self._memo: dict[str, str] = json.loads(self._memo_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._memo = {}

    def files(self, pattern: str) -> dict[str, str]:
        """Base name -> fingerprint of every file that a path, glob, folder or URL names.

        Raises DataFileError when nothing matches.
        """
        fs, _ = fsspec.core.url_to_fs(pattern)
        paths = list_files(pattern)
        start = len(os.path.commonpath([os.path.dirname(p) for p in paths]))
        return {p[start:].lstrip("/"): self._one(fs, p) for p in paths}

    def file(self, path: Path) -> str:
        """The fingerprint of a local file."""
        return self._one(LocalFileSystem(), str(path))

    def _one(self, fs: fsspec.AbstractFileSystem, path: str) -> str:
        if not isinstance(fs, LocalFileSystem):
            info = fs.info(path)
            marks = {
                key: str(info.get(key)) for key in ("ETag", "etag", "size", "created", "mtime")
            }
            return digest(marks)
        memo_key = file_state(path)
        if memo_key not in self._memo:
            self._memo[memo_key] = hash_file(Path(path))
            self._save()
        return self._memo[memo_key]

    def _save(self) -> None:
        self._memo_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._memo_path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._memo))
        os.replace(temporary, self._memo_path)
