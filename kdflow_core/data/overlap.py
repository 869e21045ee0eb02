"""Held-out prompts that training data has nearly: the split goes by the very text of a prompt, and
what differs in case, punctuation or white space alone may stand on both sides.
"""

import hashlib
import re
from array import array
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

UNSPOKEN = re.compile(r"[\W_]+")


def spoken_hash(prompt: str) -> int:
    """64 bits of a prompt's letters and digits, whatever their case."""
    text = UNSPOKEN.sub("", prompt.casefold())
    data = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(data, "big")


@dataclass
class PromptOverlap:
    """The prompts of both splits, 8 bytes each."""

    train: "array[int]" = field(default_factory=lambda: array("Q"))
    heldout: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, split: Literal["train", "heldout"], hashed: int) -> None:
        """One more sample, by its prompt's `spoken_hash`."""
        (self.train if split == "train" else self.heldout).append(hashed)

    def count(self) -> int:
        """How many held-out samples have a prompt that some training sample has, too."""
        train, heldout = (np.frombuffer(own, np.uint64) for own in (self.train, self.heldout))
        return int(np.isin(heldout, train).sum())
