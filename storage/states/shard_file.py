"""A zarr v3 shard as bytes: chunks at known offsets and an index of them at the end.

Written and read here rather than by zarr, which is several times slower at it; any zarr v3 reader
opens what is written. The codecs of a shard are those that `storage.states.metadata` declares.

Dimensions: P planes, R rows that are there, W values of a row, C rows of a chunk.
"""

from collections.abc import Sequence

import google_crc32c
import numpy as np
from numcodecs import zstd

from storage.errors import StoreCorruptError

CRC_BYTES = 4
ABSENT = 2**64 - 1
ZSTD_LEVEL = 1


def encode_shard(
    chunks: Sequence[Sequence[np.ndarray]], *, chunks_of_shard: int, compressed: bool
) -> bytes:
    """The file of a shard: `chunks[plane][i]` are whole chunks, of which there may be fewer than
    the shard's `chunks_of_shard`; what is missing takes no room.
    """
    index = np.full((len(chunks), chunks_of_shard, 2), ABSENT, "<u8")
    parts: list[bytes | memoryview] = []
    offset = 0
    for plane, of_plane in enumerate(chunks):
        for number, chunk in enumerate(of_plane):
            content: bytes | memoryview = np.ascontiguousarray(chunk).data.cast("B")
            if compressed:
                packed = zstd.compress(content, ZSTD_LEVEL)
                content = packed + _crc(packed)
            index[plane, number] = offset, len(content)
            parts.append(content)
            offset += len(content)
    packed_index = index.tobytes()
    return b"".join([*parts, packed_index, _crc(packed_index)])


def _crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


class ShardFile:
    """A shard's bytes (uint8, in memory or mapped), read. `title` names them in errors.

    Raises StoreCorruptError when they are not a whole shard.
    """

    def __init__(
        self,
        content: np.ndarray,
        *,
        title: str,
        planes: int,
        chunks_of_shard: int,
        chunk_shape: tuple[int, ...],
        dtype: np.dtype[np.generic],
        compressed: bool,
    ) -> None:
        self._title = title
        self._shape = chunk_shape
        self._dtype = dtype
        self._bytes = content
        index_bytes = planes * chunks_of_shard * 16
        if len(content) < index_bytes + CRC_BYTES:
            raise self._damaged("it is cut off")
        packed = content[len(content) - index_bytes - CRC_BYTES :].tobytes()
        if packed[-CRC_BYTES:] != _crc(packed[:-CRC_BYTES]):
            raise self._damaged("its index does not have its checksum")
        index = np.frombuffer(packed[:-CRC_BYTES], "<u8")
        self._index = index.reshape(planes, chunks_of_shard, 2)
        self._data_bytes = len(content) - len(packed)
        self._plain = None if compressed else self._lie_back_to_back()

    def _lie_back_to_back(self) -> np.ndarray:
        """The rows of an uncompressed shard of one plane, without a copy: [1, R, W]."""
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        count = self._data_bytes // size
        expected = np.arange(count, dtype=np.uint64) * np.uint64(size)
        if (
            self._data_bytes != count * size
            or not np.array_equal(self._index[0, :count, 0], expected)
            or (self._index[0, :count, 1] != size).any()
        ):
            raise self._damaged("its chunks do not lie back to back")
        rows = self._bytes[: self._data_bytes].view(self._dtype)
        return np.asarray(rows).reshape(1, count * self._shape[0], *self._shape[1:])

    def _damaged(self, how: str) -> StoreCorruptError:
        return StoreCorruptError(f"{self._title} is not a whole shard: {how}")

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows [P, start:stop, W]; where nothing is compressed, without a copy."""
        if self._plain is not None:
            if stop > self._plain.shape[1]:
                raise self._damaged(f"it has no row {stop - 1}")
            return self._plain[:, start:stop]
        chunk_rows = self._shape[0]
        out = np.empty((len(self._index), stop - start, *self._shape[1:]), self._dtype)
        for plane in range(len(self._index)):
            for number in range(start // chunk_rows, -(-stop // chunk_rows)):
                first = number * chunk_rows
                begin, end = max(start, first), min(stop, first + chunk_rows)
                chunk = self._unpack(plane, number)
                out[plane, begin - start : end - start] = chunk[begin - first : end - first]
        return out

    def _unpack(self, plane: int, number: int) -> np.ndarray:
        offset, length = (int(value) for value in self._index[plane, number])
        if offset == ABSENT or offset + length > self._data_bytes:
            raise self._damaged(f"it has no chunk {number}")
        packed = self._bytes[offset : offset + length].tobytes()
        if packed[-CRC_BYTES:] != _crc(packed[:-CRC_BYTES]):
            raise self._damaged(f"chunk {number} does not have its checksum")
        chunk = np.frombuffer(zstd.decompress(packed[:-CRC_BYTES]), self._dtype)
        return chunk.reshape(self._shape)
