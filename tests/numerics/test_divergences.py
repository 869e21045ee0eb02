"""Divergences against float64 sums written from the papers, and against scipy and torch."""

import numpy as np
import pytest
import scipy.special
import torch

from configs.schema.loss import ForwardKLConfig, ReverseKLConfig
from kdflow_core.losses import LOSSES, build_divergence
from kdflow_core.losses.base import Divergence

PAIRS = [("forward_kl", (0, 1)), ("reverse_kl", (1, 0))]


def log_distributions(seed: int, shape: tuple[int, int] = (5, 17)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.log_softmax(torch.randn(shape, generator=generator, dtype=torch.float64) * 2, -1)
        for _ in range(2)
    )


@pytest.mark.parametrize(("name", "order"), PAIRS)
def test_value_is_scipys_relative_entropy(name: str, order: tuple[int, int]) -> None:
    log_p_TV, log_q_TV = log_distributions(0)
    value_T, _ = LOSSES[name]().value_and_gradient(log_q_TV, log_p_TV)
    first, second = (log.exp().numpy() for log in [(log_p_TV, log_q_TV)[i] for i in order])
    expected_T = scipy.special.rel_entr(first, second).sum(-1)
    np.testing.assert_allclose(value_T.numpy(), expected_T, rtol=1e-12)


@pytest.mark.parametrize("divergence", [cls() for cls in LOSSES.values()], ids=list(LOSSES))
def test_gradient_is_that_of_the_value(divergence: Divergence) -> None:
    """Central differences of the value, for every logit."""
    generator = torch.Generator().manual_seed(3)
    logits_TV = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    log_p_TV = torch.log_softmax(torch.randn(3, 7, generator=generator, dtype=torch.float64), -1)
    _, gradient_TV = divergence.value_and_gradient(torch.log_softmax(logits_TV, -1), log_p_TV)
    step = 1e-6
    for v in range(7):
        shift_V = torch.zeros(7, dtype=torch.float64)
        shift_V[v] = step
        values = [
            divergence.value_and_gradient(torch.log_softmax(logits_TV + s, -1), log_p_TV)[0]
            for s in (shift_V, -shift_V)
        ]
        torch.testing.assert_close(
            (values[0] - values[1]) / (2 * step), gradient_TV[:, v], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", list(LOSSES))
def test_equal_distributions_give_zero(name: str) -> None:
    log_p_TV, _ = log_distributions(1)
    value_T, gradient_TV = LOSSES[name]().value_and_gradient(log_p_TV, log_p_TV)
    assert value_T.abs().max() < 1e-12
    assert gradient_TV.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "pinned"), [("forward_kl", 0.14384104), ("reverse_kl", 0.13081204)]
)
def test_pinned_number(name: str, pinned: float) -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4), worked out by hand."""
    log_p_TV = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    log_q_TV = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    value_T, _ = LOSSES[name]().value_and_gradient(log_q_TV, log_p_TV)
    assert value_T.item() == pytest.approx(pinned, abs=1e-8)


def test_every_schema_builds_its_divergence() -> None:
    for config in (ForwardKLConfig(temperature=2.0), ReverseKLConfig()):
        assert build_divergence(config).temperature == config.temperature
        assert type(build_divergence(config)) is LOSSES[config.type]
