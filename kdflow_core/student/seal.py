"""The checksums of a checkpoint's files, so that a damaged one is not trained on.

Each rank writes those of the files that it has written. Loads no torch: `kdflow store verify` reads
them too.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

METADATA = ".metadata"  # torch's; rank 0 writes it


def write_seal(folder: Path, *, rank: int, ranks: int) -> list[str]:
    """Record the size (bytes) and XXH3-128 of what a rank has written into a checkpoint; the names
    of that, and of the record.
    """
    mine = [path for path in folder.glob(f"__{rank}_*") if path.is_file()]
    if rank == 0:
        mine.append(folder / METADATA)
    files = {path.name: [path.stat().st_size, _hash(path)] for path in sorted(mine)}
    text = json.dumps({"ranks": ranks, "files": files}, sort_keys=True)
    sealed = json.dumps({"xxh3": xxhash.xxh3_128_hexdigest(text.encode()), "seal": text})
    _seal(folder, rank).write_text(sealed, encoding="utf-8")
    return [*files, _seal(folder, rank).name]


def damage_of(folder: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is as it was written. Of its files,
    only every `ranks`-th from the `rank`-th on is read.
    """
    try:
        recorded = dict(_recorded(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its checksums cannot be read: {type(error).__name__}: {error}"
    for name in sorted(recorded)[rank::ranks]:
        size, checksum = recorded[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is gone"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, recorded were {size}"
        if _hash(path) != checksum:
            return f"{name} does not have its checksum"
    return None


def _recorded(folder: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    """Size and checksum by name, from the seals of all ranks that have written."""
    rank, ranks = 0, 1
    while rank < ranks:
        seal = _read_seal(_seal(folder, rank))
        ranks = int(seal["ranks"])
        for name, (size, checksum) in seal["files"].items():
            yield str(name), (int(size), str(checksum))
        rank += 1


def _read_seal(path: Path) -> dict[str, Any]:
    outer = json.loads(path.read_text(encoding="utf-8"))
    if xxhash.xxh3_128_hexdigest(outer["seal"].encode()) != outer["xxh3"]:
        raise ValueError(f"{path.name} does not have its checksum")
    seal: dict[str, Any] = json.loads(outer["seal"])
    return seal


def _seal(folder: Path, rank: int) -> Path:
    return folder / f"checksums-{rank}.json"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
