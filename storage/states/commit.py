"""What is recorded of a finished shard."""

import base64
import json
from dataclasses import dataclass

import numpy as np
import xxhash

from storage.artifact import FileRecord


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A shard's rows, its files, the XXH3-64 of each sequence's rows (uint64), and what was
    measured of a lossy codec.
    """

    rows: int
    files: tuple[FileRecord, ...]
    rows_xxh3: np.ndarray
    measured: dict[str, float]

    def to_bytes(self) -> bytes:
        """As JSON with a checksum of its own."""
        fields = {
            "rows": self.rows,
            "files": [file.model_dump() for file in self.files],
            "rows_xxh3": base64.b64encode(self.rows_xxh3.astype("<u8").tobytes()).decode(),
            "measured": self.measured,
        }
        text = json.dumps(fields)
        return json.dumps({"xxh3": _checksum(text), "commit": text}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Commit | None":
        """None for a damaged one."""
        try:
            outer = json.loads(content)
            if _checksum(outer["commit"]) != outer["xxh3"]:
                return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        fields = json.loads(outer["commit"])
        return cls(
            rows=fields["rows"],
            files=tuple(FileRecord(**file) for file in fields["files"]),
            rows_xxh3=np.frombuffer(base64.b64decode(fields["rows_xxh3"]), "<u8"),
            measured=fields["measured"],
        )


def _checksum(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
