"""`planes`: lossless; exponents apart from signs and mantissas, each through zstd.

The exponents of a hidden state take few values and compress to about 40 %; signs and mantissas do
not compress, and zstd keeps them as they are.

Dimensions: N rows, H hidden size.
"""

import numpy as np


class Planes:
    """Two planes of bytes: exponents, then sign and mantissa."""

    name = "planes"
    lossless = True
    compressed = True
    dtype: np.dtype[np.generic] = np.dtype(np.uint8)
    planes = 2

    def width(self, hidden_size: int) -> int:
        """See `Codec`."""
        return hidden_size

    def fit(self, bits_NH: np.ndarray) -> np.ndarray | None:  # noqa: ARG002 - nothing to fit
        """See `Codec`."""
        return None

    def encode(
        self,
        bits_NH: np.ndarray,
        fitted_H: np.ndarray | None,  # noqa: ARG002 - nothing fitted
    ) -> np.ndarray:
        """See `Codec`."""
        stored_PNH = np.empty((2, *bits_NH.shape), np.uint8)
        np.right_shift(bits_NH, 7, out=stored_PNH[0], casting="unsafe")  # drops the sign
        np.copyto(stored_PNH[1], bits_NH & 0x7F | bits_NH >> 8 & 0x80, casting="unsafe")
        return stored_PNH

    def decode(
        self,
        stored_PNW: np.ndarray,
        fitted_H: np.ndarray | None,  # noqa: ARG002 - nothing fitted
    ) -> np.ndarray:
        """See `Codec`."""
        bits_NH: np.ndarray = stored_PNW[0].astype(np.uint16)
        bits_NH <<= 7
        rest_NH = stored_PNW[1].astype(np.uint16)
        bits_NH |= rest_NH & 0x7F
        rest_NH &= 0x80
        rest_NH <<= 8
        bits_NH |= rest_NH
        return bits_NH
