"""What stored rows take in each codec, measured on a sample.

Dimensions: N rows, H hidden size, P planes, W values of a plane.
"""

import numpy as np

from storage.codecs import codec_named
from storage.states.layout import TARGET_BYTES
from storage.states.shard_file import encode_shard


def stored_sample(bits_NH: np.ndarray, codec: str) -> tuple[float, np.ndarray]:
    """Bytes per row of `codec` with its target id, and the rows as they come back, in bits."""
    form = codec_named(codec)
    fitted_H = form.fit(bits_NH)
    stored_PNW = form.encode(bits_NH, fitted_H)
    content = encode_shard(
        [[plane_NW] for plane_NW in stored_PNW], chunks_of_shard=1, compressed=form.compressed
    )
    return len(content) / len(bits_NH) + TARGET_BYTES, form.decode(stored_PNW, fitted_H)
