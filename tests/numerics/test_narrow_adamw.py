"""AdamW with weights or moments in bfloat16, against torch's and against exact numbers."""

import math

import pytest
import torch

from kdflow_core.student import narrow_adamw
from kdflow_core.student.narrow_adamw import NarrowAdamW

STEPS, LR, BETAS = 300, 1e-4, (0.9, 0.95)


def trained(
    weights: torch.Tensor, moments: torch.dtype | None, *, decay: float = 0.0, steps: int = STEPS
) -> torch.Tensor:
    """Weights after steps on gradients that change; by torch's AdamW where `moments` is None."""
    parameter = torch.nn.Parameter(weights.clone())
    groups = [{"params": [parameter], "weight_decay": decay}]
    optimizer: torch.optim.Optimizer
    if moments is None:
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    else:
        optimizer = NarrowAdamW(groups, lr=LR, betas=BETAS, moments_dtype=moments)
    for step in range(steps):
        size = 1.5 + math.sin(step)
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    return parameter.detach()


def test_in_float32_it_is_torchs() -> None:
    torch.manual_seed(0)
    weights = torch.randn(5, 40)
    found = trained(weights, torch.float32, decay=0.3)
    torch.testing.assert_close(found, trained(weights, None, decay=0.3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [1 << 24, 1000])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_steps_far_below_the_spacing_of_bfloat16_add_up(
    monkeypatch: pytest.MonkeyPatch, moments: torch.dtype, chunk: int
) -> None:
    """A step is a fortieth of the distance from 1 to the number before it: rounded to the nearest,
    weights never move.
    """
    monkeypatch.setattr(narrow_adamw, "CHUNK", chunk)
    weights = torch.ones(4096)
    exact = trained(weights.double(), None)
    assert torch.equal(trained(weights.bfloat16(), None), weights.bfloat16())
    found = trained(weights.bfloat16(), moments)
    assert found.dtype == torch.bfloat16
    moved, expected = 1 - found.double().mean().item(), 1 - exact[0].item()
    assert expected > 0.01
    assert moved == pytest.approx(expected, rel=0.02)


def test_numbers_are_rounded_to_a_neighbour_by_their_distance() -> None:
    low, high = 1.0, 1.0 + 2.0**-7
    exact = torch.full((200_000,), low + 0.3 * (high - low))
    kept = torch.empty(len(exact), dtype=torch.bfloat16)
    narrow_adamw._keep_(kept, exact, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {low, high}
    assert (kept == high).double().mean().item() == pytest.approx(0.3, abs=0.005)
    narrow_adamw._keep_(kept, -exact, torch.Generator().manual_seed(1))
    assert (kept == -high).double().mean().item() == pytest.approx(0.3, abs=0.005)


def test_what_bfloat16_holds_stays() -> None:
    special = [0.0, -0.0, 1.0, -2.5, 2.0**-130, math.inf, -math.inf, math.nan]
    exact = torch.tensor(special * 1000)
    kept = torch.empty(len(exact), dtype=torch.bfloat16)
    narrow_adamw._keep_(kept, exact, torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_the_same_step_draws_the_same_and_another_one_does_not() -> None:
    weights = torch.ones(4096).bfloat16()
    once, again = (trained(weights, torch.bfloat16, steps=3) for _ in range(2))
    assert torch.equal(once, again)
    assert len(once.unique()) > 1
    both = [torch.nn.Parameter(weights.clone()) for _ in range(2)]
    optimizer = NarrowAdamW([{"params": both}], lr=LR, betas=BETAS, moments_dtype=torch.bfloat16)
    for parameter in both:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(*both)
