"""Where each sample stands in a token table: a sorted column of what samples are known by.

Beside `train.arrow`, `train.keys.arrow`. A later table of more data takes what is here from here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.digests import DIGEST_BYTES, Digests, digest_column
from storage.store import disk_errors


def keys_path(table: Path) -> Path:
    """Where the keys of a token table's file are."""
    return table.with_suffix(f".keys{table.suffix}")


def write_keys(path: Path, keys: Sequence[bytes | None]) -> None:
    """The keys of a table's rows, 16 bytes each, in their order; None for a row that is not to be
    found. Of equal keys the first is.
    """
    rows = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    ordered = sorted(rows)
    packed = np.frombuffer(b"".join(ordered), np.uint8).reshape(-1, DIGEST_BYTES)
    columns = {
        "key": digest_column(packed),
        "row": pa.array([rows[key] for key in ordered], pa.int64()),
    }
    batch = pa.record_batch(columns)
    with (
        disk_errors(str(path)),
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


class TokenKeys:
    """The keys of one table, memory-mapped."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
        self._keys = Digests(table.column("key").combine_chunks())
        self._rows = table.column("row").to_numpy()

    def row(self, key: bytes) -> int | None:
        """The row of a sample; None where it is not there."""
        position = self._keys.position(key)
        return None if position is None else int(self._rows[position])
