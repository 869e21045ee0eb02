"""Sampling by seeds: the generator's published numbers, and the distribution."""

import numpy as np
import pytest
import torch

from kdflow_core.sglang_runtime.sampling import seeded_choice, uniform

# The first outputs of SplitMix64's reference implementation (Vigna, splitmix64.c).
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
}


@pytest.mark.parametrize("seed", PUBLISHED)
def test_the_numbers_are_splitmix64s(seed: int) -> None:
    found = uniform(torch.full((3,), seed), torch.arange(3))
    assert found.tolist() == [(value >> 11) * 2.0**-53 for value in PUBLISHED[seed]]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    """Over seeds and over positions; a token without probability never does."""
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 20_000
    log_prob_BV = (7 * p_V).log().expand(count, -1)  # it need not sum to one
    numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for seed_B, position_B in ((numbers, zeros), (zeros, numbers)):
        chosen = seeded_choice(log_prob_BV, seed_B, position_B)
        assert chosen.shape == (count, 1)
        observed_V = np.bincount(chosen[:, 0].numpy(), minlength=len(p_V)) / count
        # Five standard deviations.
        bound_V = 5 * np.sqrt(p_V.numpy() / count)
        assert (np.abs(observed_V - p_V.numpy()) <= bound_V).all()


def test_a_rows_choice_is_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob_BV = torch.randn(5, 1000, generator=generator).log_softmax(-1)
    seed_B, position_B = torch.tensor([2**62, 7, 2**62, -1, 0]), torch.tensor([3, 3, 4, 0, 900])
    together = seeded_choice(log_prob_BV, seed_B, position_B)
    for row in range(5):
        alone = seeded_choice(
            log_prob_BV[row : row + 1], seed_B[row : row + 1], position_B[row : row + 1]
        )
        assert torch.equal(alone, together[row : row + 1])
    assert len(set(together[:, 0].tolist())) == 5
