"""Rounding at random: up or down, to each the more often the nearer it is, and so right on average
(stochastic rounding: arXiv 2010.06192, section 3.1).
"""

import torch


def noise_for(exact: torch.Tensor, cut_bits: int, draws: torch.Generator) -> torch.Tensor:
    """What `cut` adds to float32 numbers: any of the numbers that `cut_bits` bits hold."""
    noise = torch.empty(exact.shape, dtype=torch.int32, device=exact.device)
    return noise.random_(0, 1 << cut_bits, generator=draws)


def cut(exact: torch.Tensor, noise: torch.Tensor, cut_bits: int) -> torch.Tensor:
    """Float32 numbers without their last `cut_bits` bits, after so much noise was added that the
    cut carries over as often as it should.
    """
    bits = exact.view(torch.int32) + noise
    return bits.bitwise_and_(-(1 << cut_bits)).view(torch.float32)
