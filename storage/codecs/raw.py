"""`raw`: the bits of bfloat16 as they are, to be read without a copy.

Dimensions: N rows, H hidden size.
"""

import numpy as np


class Raw:
    """One plane, the row itself."""

    name = "raw"
    lossless = True
    compressed = False
    dtype: np.dtype[np.generic] = np.dtype(np.uint16)
    planes = 1

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
        return bits_NH[None]

    def decode(
        self,
        stored_PNW: np.ndarray,
        fitted_H: np.ndarray | None,  # noqa: ARG002 - nothing fitted
    ) -> np.ndarray:
        """See `Codec`."""
        bits_NH: np.ndarray = stored_PNW[0]
        return bits_NH
