"""A sorted column of sequences' digests, looked up without a Python object for each.

Not as NumPy's byte strings: those lose the zeros at the end of one digest in 256.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

DIGEST_BYTES = 16


def digest_column(digests: np.ndarray) -> pa.Array:
    """uint8 [N, 16] as a column of Arrow's."""
    packed = pa.py_buffer(np.ascontiguousarray(digests, np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(DIGEST_BYTES), len(digests), [None, packed]
    )


class Digests(Sequence[bytes]):
    """Such a column, ascending."""

    def __init__(self, column: pa.Array) -> None:
        self._bytes = memoryview(column.buffers()[1])
        self._length = len(column)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override] # no slices
        begin = index * DIGEST_BYTES
        return bytes(self._bytes[begin : begin + DIGEST_BYTES])

    def as_array(self) -> np.ndarray:
        """All of them, without a copy: uint8 [N, 16]."""
        flat = np.frombuffer(self._bytes, np.uint8, DIGEST_BYTES * len(self))
        return flat.reshape(-1, DIGEST_BYTES)

    def position(self, digest: bytes) -> int | None:
        """Where a digest stands; None when it is not there."""
        position = bisect_left(self, digest)
        here = position < len(self) and self[position] == digest
        return position if here else None
