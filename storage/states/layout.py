"""What is to be stored, and where each sequence goes.

Dimensions: N sequences, K shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.codecs import codec_named
from storage.errors import StoreError

CHUNK_BYTES = 512 << 10
SHARD_BYTES = 64 << 20
TARGET_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences to be stored, by digest: `digests` uint8 [N, 16], ascending and distinct,
    `num_rows` int32 [N], and `source` int16 [N], the numbers of the `source_names`.
    """

    digests: np.ndarray
    num_rows: np.ndarray
    source: np.ndarray
    source_names: tuple[str, ...]

    def __post_init__(self) -> None:
        keys = np.ascontiguousarray(self.digests).view(">u8").reshape(-1, 2).astype(np.uint64)
        before, after = keys[:-1], keys[1:]
        rising = (before[:, 0] < after[:, 0]) | (
            (before[:, 0] == after[:, 0]) & (before[:, 1] < after[:, 1])
        )
        if not rising.all():
            raise StoreError("the sequences to be stored are not in the order of their digests")

    def __len__(self) -> int:
        return len(self.num_rows)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the arrays, in rows, and the codec. A shard holds whole sequences, so that its end
    may be empty; what is empty takes no room.
    """

    hidden_size: int
    num_rows: int
    num_shards: int
    shard_rows: int
    chunk_rows: int
    codec: str

    @property
    def num_bytes(self) -> int:
        """What the rows take on disk, in bytes, at most: without index and checksums, and before
        compression.
        """
        return self.num_rows * (row_bytes(self.codec, self.hidden_size) + TARGET_BYTES)


def row_bytes(codec: str, hidden_size: int) -> int:
    """Bytes of a stored row before compression."""
    form = codec_named(codec)
    return form.planes * form.width(hidden_size) * form.dtype.itemsize


def plan_layout(
    *,
    hidden_size: int,
    num_rows: Sequence[int] | np.ndarray,
    shard_rows: int | None,
    chunk_rows: int | None,
    codec: str,
) -> Layout:
    """Shards of about 64 MiB in chunks of about 512 KiB, both powers of two in rows; larger shards
    where one sequence needs them.
    """
    counts = np.asarray(num_rows, np.int64)
    one_row = 2 * hidden_size
    chunk = chunk_rows or min(max(2 ** round(math.log2(CHUNK_BYTES / one_row)), 32), 256)
    shard = shard_rows or max(2 ** round(math.log2(SHARD_BYTES / one_row)), chunk)
    longest = int(counts.max(initial=0))
    shard = max(shard, math.ceil(longest / chunk) * chunk)
    return Layout(
        hidden_size=hidden_size,
        num_rows=int(counts.sum()),
        num_shards=len(assign(counts, shard)) - 1,
        shard_rows=shard,
        chunk_rows=chunk,
        codec=codec,
    )


def assign(num_rows: np.ndarray, shard_rows: int) -> np.ndarray:
    """Shard k holds the sequences from number [k] to [k + 1]: as many as fit, in order. At least
    one shard. Shape [K + 1].
    """
    ends = np.cumsum(num_rows, dtype=np.int64)
    bounds, begin = [0], 0
    while begin < len(ends):
        before = int(ends[begin - 1]) if begin else 0
        begin = int(np.searchsorted(ends, before + shard_rows, side="right"))
        bounds.append(begin)
    return np.array(bounds if len(bounds) > 1 else [0, 0], np.int64)


def shard_of(first_row: np.ndarray, num_rows: np.ndarray, shard_rows: int) -> np.ndarray:
    """The shard of each sequence; one without rows behind a full shard is of that, not the next."""
    return np.asarray(np.maximum(first_row - (num_rows == 0), 0) // shard_rows)


def first_rows(num_rows: np.ndarray, bounds: np.ndarray, shard_rows: int) -> np.ndarray:
    """The row at which each sequence begins, counted over all shards as if they were full."""
    ends = np.cumsum(num_rows, dtype=np.int64)
    begins = ends - num_rows
    counts = np.diff(bounds)
    heads = begins[np.minimum(bounds[:-1], max(len(begins) - 1, 0))] if len(begins) else bounds[:-1]
    base = np.arange(len(counts)) * shard_rows - heads
    return np.asarray(begins + np.repeat(base, counts), np.int64)
