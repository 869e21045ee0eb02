"""The zarr metadata of a store of hidden states: what any zarr v3 reader needs.

Dimensions: H hidden size, K shards, S rows of a shard, C rows of a chunk, P planes, W values.
"""

from typing import Any

import zarr
import zarr.codecs
import zarr.storage

from storage.codecs import codec_named
from storage.states.layout import Layout
from storage.states.shard_file import ZSTD_LEVEL


def zarr_metadata(layout: Layout) -> dict[str, bytes]:
    """The `zarr.json` files by name, relative to `states.zarr`."""
    codec = codec_named(layout.codec)
    memory: dict[str, Any] = {}
    group = zarr.open_group(zarr.storage.MemoryStore(memory), mode="w")
    attributes: dict[str, Any] = {
        "logical_dtype": "bfloat16",
        "codec": layout.codec,
        "meaning": "row i predicts target_ids[i]",
    }
    shape = (codec.planes, layout.shard_rows, codec.width(layout.hidden_size))
    packing = (zarr.codecs.ZstdCodec(level=ZSTD_LEVEL), zarr.codecs.Crc32cCodec())
    group.create_array(
        "hidden",
        shape=(layout.num_shards, *shape),
        chunks=(1, 1, layout.chunk_rows, shape[2]),
        shards=(1, *shape),
        dtype=codec.dtype,
        compressors=packing if codec.compressed else None,
        filters=None,
        attributes=attributes,
    )
    group.create_array(
        "target_ids",
        shape=(layout.num_shards, layout.shard_rows),
        chunks=(1, layout.chunk_rows),
        shards=(1, layout.shard_rows),
        dtype="int32",
        compressors=None,
        filters=None,
    )
    if not codec.lossless:
        group.create_array(
            "fitted",
            shape=(layout.hidden_size,),
            chunks=(layout.hidden_size,),
            dtype="float32",
            compressors=None,
            filters=None,
        )
    return {name: content.to_bytes() for name, content in memory.items()}
