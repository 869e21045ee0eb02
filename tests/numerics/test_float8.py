"""Moments in float8: which numbers are kept, and what AdamW makes of them."""

import math

import pytest
import torch

from configs.schema.student import FLOAT8_GROUP
from kdflow_core.student import narrow_adamw
from kdflow_core.student.float8 import pack_, scales_of, unpacked
from kdflow_core.student.narrow_adamw import NarrowAdamW

DRAWS = 2000


def kept(values_RM: torch.Tensor, *, is_root: bool = False, seed: int = 0) -> torch.Tensor:
    """What is read back, in float64."""
    codes_RM = torch.zeros(values_RM.shape, dtype=torch.float8_e4m3fn)
    scales_RG = scales_of(values_RM)
    draws = torch.Generator().manual_seed(seed)
    pack_(codes_RM, scales_RG, values_RM, is_root=is_root, draws=draws)
    return unpacked(codes_RM, scales_RG, is_root=is_root).double()


def numbers() -> torch.Tensor:
    """All numbers of float8_e4m3fn from 0 on, by its definition (arXiv 2209.05433, table 1)."""
    small = [k * 2.0**-9 for k in range(8)]
    normal = [(1 + k / 8) * 2.0**e for e in range(-6, 9) for k in range(8)]
    return torch.tensor([*small, *normal[:-1]], dtype=torch.float64)  # the last one is its NaN


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers below and above, of values that are none."""
    above = torch.searchsorted(numbers(), values.abs())
    return numbers()[above - 1] * values.sign(), numbers()[above] * values.sign()


def test_every_value_becomes_one_of_its_neighbours_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-11, 8.5, FLOAT8_GROUP - 1, base=2.0, dtype=torch.float64)
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2.0 - 1
    values = torch.cat([sizes * signs, torch.tensor([448.0])]).float()[None]  # so the scale is 1
    drawn = torch.cat([kept(values, seed=seed) for seed in range(DRAWS)])
    exact = values[0, :-1].double()
    low, high = neighbours(exact)
    is_one = (drawn[:, :-1] == low) | (drawn[:, :-1] == high)
    assert is_one.all()
    spread = (high - low).abs()
    error = (drawn[:, :-1].mean(0) - exact) / spread
    assert error.abs().max() < 5 * 0.5 / math.sqrt(DRAWS)
    assert (drawn[:, -1] == 448).all()


@pytest.mark.parametrize("width", [1, 127, 128, 130, 576])
def test_every_group_has_its_own_scale(width: int) -> None:
    """Numbers of one group do not tell on those of another one, whatever their sizes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, width, generator=generator)
    groups = torch.arange(width) // FLOAT8_GROUP
    sizes = 10.0 ** torch.tensor([-12.0, 6.0, -3.0, 9.0, -20.0])
    values = values * sizes[groups] * torch.tensor([[1.0], [1e-6], [1e5]])
    found = kept(values)
    for group in range(int(groups[-1]) + 1):
        mine = groups == group
        largest = values[:, mine].abs().amax(1, keepdim=True).double()
        error = (found[:, mine] - values[:, mine].double()).abs()
        assert (error <= values[:, mine].double().abs() / 8 + largest / 448 * 2**-9).all()


def test_what_is_divided_by_never_becomes_nothing() -> None:
    values = torch.full((4, FLOAT8_GROUP), 1e-30)
    values[:, 0] = 1.0
    values[3, 5] = 0.0
    found = kept(values, is_root=True)
    assert (found[:, 1:5] > 0).all()
    assert found[3, 5] == 0
    assert (kept(torch.zeros(2, 200), is_root=True) == 0).all()
    # As a mean it may, which is right on average.
    assert (kept(values) == 0).any()


def test_steps_are_those_of_adamw() -> None:
    """On gradients of many sizes, some of whose rows are 0 at most steps: as far as AdamW in
    float64 goes, and never further than AdamW can.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(64, 200)
    sizes = 10.0 ** (4 * torch.rand(64, 200, generator=generator) - 6)
    both = [torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.double())]
    lr, betas, steps = 1e-3, (0.9, 0.95), 200
    ours = NarrowAdamW(
        [{"params": both[:1]}], lr=lr, betas=betas, moments_dtype=torch.float8_e4m3fn
    )
    exact = torch.optim.AdamW(both[1:], lr=lr, betas=betas, weight_decay=0.0)
    for _ in range(steps):
        gradient = sizes * (0.5 + torch.randn(sizes.shape, generator=generator))
        gradient[:8] *= torch.rand(8, 1, generator=generator) < 0.05
        before = both[0].detach().clone()
        both[0].grad, both[1].grad = gradient, gradient.double()
        ours.step()
        exact.step()
        assert (both[0].detach() - before).abs().max() < 8 * lr
    found, expected = both[0].detach().double(), both[1].detach()
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.97
    assert found[8:].mean().item() == pytest.approx(expected[8:].mean().item(), rel=0.03)
    codes, vector = ours.state[both[0]]["exp_avg"], torch.nn.Parameter(torch.zeros(300))
    assert codes.dtype == torch.float8_e4m3fn
    vector.grad = torch.ones(300)
    other = NarrowAdamW([{"params": [vector]}], lr=lr, betas=betas, moments_dtype=codes.dtype)
    other.step()
    assert other.state[vector]["exp_avg"].dtype == torch.float32


def test_rows_that_share_no_chunk_are_stepped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are whole rows: the same scales, and one step of them."""
    moved = []
    for chunk in (1 << 22, 1000, 10):
        monkeypatch.setattr(narrow_adamw, "CHUNK", chunk)
        weights = torch.nn.Parameter(torch.zeros(2, 30, 130))
        weights.grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
        optimizer = NarrowAdamW(
            [{"params": [weights]}], lr=1.0, betas=(0.9, 0.95), moments_dtype=torch.float8_e4m3fn
        )
        optimizer.step()
        moved.append((weights.detach(), optimizer.state[weights]["exp_avg_scales"]))
    for weights_found, scales in moved[1:]:
        torch.testing.assert_close(weights_found, moved[0][0], rtol=0, atol=0)
        torch.testing.assert_close(scales, moved[0][1], rtol=0, atol=0)
