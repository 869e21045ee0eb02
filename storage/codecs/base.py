"""What a codec is: another form of the rows of hidden states.

Dimensions: N rows, H hidden size, P planes of a stored row, W width of a plane in values.
"""

from typing import Protocol

import numpy as np


class Codec(Protocol):
    """Rows of bfloat16 (as uint16 bits) to what is stored, and back.

    A stored row is P planes of W values of `dtype`. Where `compressed`, chunks pass through zstd
    and carry a CRC of their own; else they lie in the file as they are, to be mapped into memory.
    """

    @property
    def name(self) -> str:
        """Its name in configs and manifests."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back the very bits."""
        ...

    @property
    def compressed(self) -> bool:
        """Whether chunks are compressed."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The type of stored values."""
        ...

    @property
    def planes(self) -> int:
        """P."""
        ...

    def width(self, hidden_size: int) -> int:
        """W for a hidden size."""
        ...

    def fit(self, bits_NH: np.ndarray) -> np.ndarray | None:
        """What is fixed once per artifact, from its first rows: a float32 [H], or nothing."""
        ...

    def encode(self, bits_NH: np.ndarray, fitted_H: np.ndarray | None) -> np.ndarray:
        """The stored form [P, N, W] of rows [N, H]."""
        ...

    def decode(self, stored_PNW: np.ndarray, fitted_H: np.ndarray | None) -> np.ndarray:
        """The rows [N, H] of a stored form; for `raw` the same memory."""
        ...
