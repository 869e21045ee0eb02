"""Working files that a later attempt goes on from, with a checksum beside each."""

import os
from pathlib import Path

from storage.digest import hash_file


def seal(path: Path) -> None:
    """Record a file's content: from now on it counts as whole."""
    mark = _mark(path)
    temporary = mark.with_name(f"{mark.name}.tmp")
    temporary.write_text(hash_file(path), encoding="ascii")
    os.replace(temporary, mark)


def is_whole(path: Path) -> bool:
    """Whether a file is as it was when it was sealed."""
    try:
        return _mark(path).read_bytes() == hash_file(path).encode()
    except FileNotFoundError:
        return False


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")
