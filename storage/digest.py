"""What identifies an artifact: a digest over canonical JSON."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 1 << 22


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no white space and no NaN: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """32 hex digits (BLAKE2b-128) over the canonical JSON of `value`."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def artifact_digest(
    *, kind: str, code_version: int, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """The identity of an artifact: kind, code version, config slice and input digests."""
    return digest(
        {"kind": kind, "code_version": code_version, "config": config, "inputs": dict(inputs)}
    )


def hash_file(path: Path) -> str:
    """XXH3-128 of a local file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
