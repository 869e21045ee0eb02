"""Local copies of single files of a remote artifact, the ones used longest ago making room."""

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np

from storage.artifact import ArtifactRef, FileRecord
from storage.digest import hash_file
from storage.errors import StoreCorruptError, StoreFullError
from storage.store import ArtifactStore, disk_errors

PARTIAL = ".tmp"
STALE_S = 3600.0
ATTEMPTS = 3


class ReadCache:
    """An artifact's files, mapped into memory: those of a local store where they are.

    Copies lie in the store's scratch, shared by all processes of a machine, and take at most
    `limit_bytes` (None: whatever there is room for). Removing a file that another process has
    mapped does it no harm.
    """

    def __init__(self, store: ArtifactStore, ref: ArtifactRef, limit_bytes: int | None) -> None:
        self._store = store
        self._folder = store.folder(ref.kind, ref.digest)
        self._root = store.scratch / "read-cache"
        self._copies = self._root / ref.kind / ref.digest
        self._limit = limit_bytes

    def map(self, file: FileRecord) -> np.ndarray:
        """The file's bytes (uint8), mapped into memory.

        Raises StoreCorruptError when it is gone or cut off.
        """
        source = f"{self._folder}/{file.path}"
        if self._store.is_local:
            return _map(Path(source))
        for _ in range(ATTEMPTS):
            path = self._copy(file, source)
            with contextlib.suppress(FileNotFoundError):  # made room of, before it was mapped
                return _map_file(path)
        raise StoreFullError(
            f"copies of {self._folder} vanish from {self._root} as soon as they are there; raise "
            "storage.read_cache_gb"
        )

    def _copy(self, file: FileRecord, source: str) -> Path:
        copy = self._copies / file.path
        with contextlib.suppress(FileNotFoundError):
            if copy.stat().st_size == file.num_bytes:
                os.utime(copy)
                return copy
        self._make_room(file.num_bytes)
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}{PARTIAL}")
        with disk_errors(str(self._copies)):
            try:
                self._store.fs.get_file(source, str(partial))
            except FileNotFoundError as error:
                raise StoreCorruptError(f"{source} is gone") from error
        size = partial.stat().st_size
        wrong = None
        if size != file.num_bytes:
            wrong = f"has {size} bytes, recorded were {file.num_bytes}"
        elif hash_file(partial) != file.xxh3:
            wrong = "does not have its checksum"
        if wrong is not None:
            partial.unlink()
            raise StoreCorruptError(f"{source} {wrong}")
        os.replace(partial, copy)
        return copy

    def _make_room(self, num_bytes: int) -> None:
        """Remove the copies used longest ago until `num_bytes` more are within the limit."""
        self._root.mkdir(parents=True, exist_ok=True)
        files = []
        for path in self._root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                stat = path.stat()
                fresh = path.name.endswith(PARTIAL) and time.time() - stat.st_mtime < STALE_S
                if path.is_file() and not fresh:
                    files.append((stat.st_mtime, stat.st_size, path))
        files.sort()
        used = sum(size for _, size, _ in files)
        room = shutil.disk_usage(self._root).free
        limit = used + room if self._limit is None else min(self._limit, used + room)
        for _, size, path in files:
            if used + num_bytes <= limit:
                break
            path.unlink(missing_ok=True)
            used -= size


def _map(path: Path) -> np.ndarray:
    try:
        return _map_file(path)
    except FileNotFoundError as error:
        raise StoreCorruptError(f"{path} is gone") from error


def _map_file(path: Path) -> np.ndarray:
    """Mapped privately: torch wants memory that it may write to, and the file stays as it is."""
    if path.stat().st_size == 0:
        raise StoreCorruptError(f"{path} is empty")
    return np.memmap(path, np.uint8, "c")
