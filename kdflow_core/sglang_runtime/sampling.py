"""Sampling that depends on a request's seed and nothing else.

SGLang's own has seeds in its deterministic mode alone, which has no backend for CPUs, and draws a
random number for every token of the vocabulary; here it is one number for each row.

Dimensions: B requests, V vocabulary.
"""

import torch

# The increment and multipliers of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
# number generators", 2014), as signed numbers: torch has no arithmetic for unsigned ones.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def seeded_choice(
    log_prob_BV: torch.Tensor, seed_B: torch.Tensor, position_B: torch.Tensor
) -> torch.Tensor:
    """An index [B, 1] of each row, drawn with probability exp(`log_prob_BV`) over the row's sum.

    The same seed and position give the same index, whatever else is in the batch.
    """
    cumulated_BV = log_prob_BV.double().exp().cumsum(-1)
    threshold_B = uniform(seed_B, position_B) * cumulated_BV[:, -1]
    # The first one above the threshold: never one without probability.
    return torch.searchsorted(cumulated_BV, threshold_B.unsqueeze(-1), right=True)


def uniform(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """A number of [0, 1) for each seed and position, float64: the SplitMix64 sequence of the seed
    at that position.
    """
    bits_B = seed_B.long() + (position_B.long() + 1) * INCREMENT
    bits_B = (bits_B ^ _shifted(bits_B, 30)) * FIRST
    bits_B = (bits_B ^ _shifted(bits_B, 27)) * SECOND
    bits_B = bits_B ^ _shifted(bits_B, 31)
    return _shifted(bits_B, 11).double() * 2.0**-53


def _shifted(bits_B: torch.Tensor, count: int) -> torch.Tensor:
    """Right, with zeros from the left."""
    return torch.bitwise_and(bits_B >> count, 2 ** (64 - count) - 1)
