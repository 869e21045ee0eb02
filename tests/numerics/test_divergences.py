"""Divergences against float64 sums written from the papers, and against scipy and torch."""

from typing import Any

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from configs.schema.loss import Divergence as DivergenceConfig
from kdflow_core.losses import LOSSES, build_divergence
from kdflow_core.losses.base import Divergence
from kdflow_core.losses.weighted_sum import WeightedSum
from tests.numerics.definitions import CASES, NAMES, Definition, adaptive_kl, evaluate

each = pytest.mark.parametrize(("name", "fields", "definition"), CASES, ids=NAMES)
SCHEMA: TypeAdapter[Any] = TypeAdapter(DivergenceConfig)


def log_distributions(
    seed: int, shape: tuple[int, int] = (5, 17), spread: float = 2.0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.log_softmax(torch.randn(shape, generator=generator, dtype=torch.float64) * spread, -1)
        for _ in range(2)
    )


def value_of(divergence: Divergence, log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> np.ndarray:
    return evaluate(divergence, log_q_TV, log_p_TV)[0].numpy()


def test_every_divergence_of_the_catalogue_has_cases() -> None:
    assert {name for name, _, _ in CASES} == set(LOSSES) - {"sampled_reverse_kl"}


@each
@pytest.mark.parametrize("shape", [(5, 17), (1, 2), (3, 1000)])
def test_value_and_gradient_are_those_of_the_definition(
    name: str, fields: dict[str, float], definition: Definition, shape: tuple[int, int]
) -> None:
    """The gradient is autograd's, through the softmax of the student's logits."""
    log_p_TV, logits_TV = log_distributions(0, shape)
    logits_TV.requires_grad_()
    expected_T = definition(log_p_TV.exp(), torch.softmax(logits_TV, -1))
    expected_T.sum().backward()
    log_q_TV = torch.log_softmax(logits_TV.detach(), -1)
    value_T, gradient_TV = evaluate(LOSSES[name](**fields), log_q_TV, log_p_TV)
    torch.testing.assert_close(value_T, expected_T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient_TV, logits_TV.grad, rtol=1e-8, atol=1e-12)


@each
def test_float32_is_near_float64(
    name: str, fields: dict[str, float], definition: Definition
) -> None:
    log_p_TV, log_q_TV = (log.float() for log in log_distributions(1, (4, 300)))
    value_T, gradient_TV = evaluate(LOSSES[name](**fields), log_q_TV, log_p_TV)
    assert value_T.dtype == gradient_TV.dtype == torch.float32
    expected_T = definition(log_p_TV.double().exp(), log_q_TV.double().exp())
    torch.testing.assert_close(value_T.double(), expected_T, rtol=2e-5, atol=1e-6)


@each
def test_equal_distributions(name: str, fields: dict[str, float], definition: Definition) -> None:
    """Zero and flat, but for the cross-entropy, which pulls on to the teacher's choice."""
    log_p_TV, _ = log_distributions(1)
    value_T, gradient_TV = evaluate(LOSSES[name](**fields), log_p_TV, log_p_TV)
    assert torch.isfinite(gradient_TV).all()
    if name == "top1_cross_entropy":
        assert (value_T > 0).all()
        return
    assert value_T.abs().max() < 1e-12
    assert gradient_TV.abs().max() < 1e-12


@each
@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_distributions_far_apart_stay_finite(
    name: str, fields: dict[str, float], definition: Definition, spread: float
) -> None:
    """In float32, where most probabilities are zero."""
    log_p_TV, log_q_TV = (log.float() for log in log_distributions(2, (6, 50), spread))
    value_T, gradient_TV = evaluate(LOSSES[name](**fields), log_q_TV, log_p_TV)
    assert torch.isfinite(value_T).all()
    assert torch.isfinite(gradient_TV).all()


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 40), spread=st.floats(0.01, 8))
def test_properties(
    name: str, fields: dict[str, float], definition: Definition, seed: int, size: int, spread: float
) -> None:
    """Not negative; the gradient sums to zero, as shifted logits are the same distribution;
    permuting the vocabulary permutes the gradient; rows do not see one another.
    """
    divergence = LOSSES[name](**fields)
    log_p_TV, log_q_TV = log_distributions(seed, (3, size), spread)
    value_T, gradient_TV = evaluate(divergence, log_q_TV, log_p_TV)
    assert (value_T >= -1e-12).all()
    assert gradient_TV.sum(-1).abs().max() < 1e-9
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    permuted_T, permuted_TV = evaluate(divergence, log_q_TV[:, order], log_p_TV[:, order])
    torch.testing.assert_close(permuted_T, value_T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(permuted_TV, gradient_TV[:, order], rtol=1e-9, atol=1e-12)
    alone_T, alone_TV = evaluate(divergence, log_q_TV[1:2], log_p_TV[1:2])
    torch.testing.assert_close(alone_T, value_T[1:2])
    torch.testing.assert_close(alone_TV, gradient_TV[1:2])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("generalized_jsd", {"beta": 0.5}),
        ("total_variation", {}),
        ("alpha_divergence", {"alpha": 0.5}),
        ("alpha_beta", {"alpha": 0.7, "beta": 0.7}),
    ],
)
def test_symmetric_ones(name: str, fields: dict[str, float]) -> None:
    log_p_TV, log_q_TV = log_distributions(4)
    divergence = LOSSES[name](**fields)
    there, back = value_of(divergence, log_p_TV, log_q_TV), value_of(divergence, log_q_TV, log_p_TV)
    np.testing.assert_allclose(there, back, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "near_forward", "near_reverse", "factor"),
    [
        ("generalized_jsd", {"beta": 1e-6}, {"beta": 1 - 1e-6}, 1e6),
        ("alpha_divergence", {"alpha": 1 - 1e-6}, {"alpha": 1e-6}, 1.0),
        ("alpha_beta", {"alpha": 1.0, "beta": 1e-6}, {"alpha": 1e-6, "beta": 1.0}, 1.0),
        ("skewed_kl", {"alpha": 1e-6}, None, 1.0),
        ("skewed_reverse_kl", None, {"alpha": 1e-6}, 1.0),
    ],
)
def test_the_kl_limits(
    name: str,
    near_forward: dict[str, float] | None,
    near_reverse: dict[str, float] | None,
    factor: float,
) -> None:
    log_p_TV, log_q_TV = log_distributions(5)
    p, q = log_p_TV.exp().numpy(), log_q_TV.exp().numpy()
    for fields, (first, second) in ((near_forward, (p, q)), (near_reverse, (q, p))):
        if fields is not None:
            value_T = value_of(LOSSES[name](**fields), log_p_TV, log_q_TV) * factor
            expected_T = scipy.special.rel_entr(first, second).sum(-1)
            np.testing.assert_allclose(value_T, expected_T, rtol=1e-3)


@pytest.mark.parametrize(("name", "order"), [("forward_kl", (0, 1)), ("reverse_kl", (1, 0))])
def test_kl_is_scipys_relative_entropy(name: str, order: tuple[int, int]) -> None:
    pair = log_distributions(0)
    first, second = (pair[i].exp().numpy() for i in order)
    expected_T = scipy.special.rel_entr(first, second).sum(-1)
    np.testing.assert_allclose(value_of(LOSSES[name](), *pair), expected_T, rtol=1e-12)


def test_jsd_is_the_square_of_scipys_distance() -> None:
    pair = log_distributions(0)
    p, q = (log.exp().numpy() for log in pair)
    expected_T = scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2
    np.testing.assert_allclose(value_of(LOSSES["generalized_jsd"](), *pair), expected_T, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "pinned"), [("forward_kl", 0.14384104), ("reverse_kl", 0.13081204)]
)
def test_pinned_number(name: str, pinned: float) -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4), worked out by hand."""
    log_p_TV = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    log_q_TV = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    assert value_of(LOSSES[name](), log_p_TV, log_q_TV)[0] == pytest.approx(pinned, abs=1e-8)


@each
def test_every_schema_builds_its_divergence(
    name: str, fields: dict[str, float], definition: Definition
) -> None:
    config = SCHEMA.validate_python({"type": name, "temperature": 2.0, **fields})
    divergence = build_divergence(config)
    assert type(divergence) is LOSSES[name]
    assert divergence.temperature == 2.0
    for field, value in fields.items():
        assert getattr(divergence, field) == value
    assert SCHEMA.validate_python({"type": name}) == type(config)()
    assert type(divergence)() == build_divergence(type(config)())  # the same defaults


def test_a_weighted_sum() -> None:
    terms = [
        {"weight": 0.3, "divergence": {"type": "forward_kl"}},
        {"weight": 1.7, "divergence": {"type": "total_variation"}},
    ]
    divergence = build_divergence(
        SCHEMA.validate_python({"type": "weighted_sum", "terms": terms, "temperature": 2.0})
    )
    assert isinstance(divergence, WeightedSum)
    assert divergence.temperature == 2.0
    log_p_TV, log_q_TV = log_distributions(6)
    names = ("forward_kl", "total_variation")
    parts = [evaluate(LOSSES[name](), log_q_TV, log_p_TV) for name in names]
    value_T, gradient_TV = evaluate(divergence, log_q_TV, log_p_TV)
    torch.testing.assert_close(value_T, 0.3 * parts[0][0] + 1.7 * parts[1][0])
    torch.testing.assert_close(gradient_TV, 0.3 * parts[0][1] + 1.7 * parts[1][1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "jsd"}, "generalized_jsd"),
        ({"type": "generalized_jsd", "beta": 1.1}, "less than or equal to 1"),
        ({"type": "skewed_kl", "alpha": 0.0}, "greater than 0"),
        ({"type": "skewed_kl", "lambda": 0.1}, "unknown key 'lambda'"),
        ({"type": "weighted_sum", "terms": []}, "at least 1 item"),
        (
            {
                "type": "weighted_sum",
                "terms": [
                    {"weight": 1.0, "divergence": {"type": "reverse_kl", "temperature": 2.0}}
                ],
            },
            "`reverse_kl` in a weighted_sum has a temperature of its own",
        ),
    ],
)
def test_what_a_schema_refuses(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SCHEMA.validate_python(config)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_the_head_of_adaptive_kl_may_be_a_few_tokens_or_most(spread: float) -> None:
    """Of a vocabulary that is not sorted as a whole where a few tokens hold the mass."""
    log_p_TV, log_q_TV = log_distributions(8, (4, 2000), spread)
    value_T, _ = evaluate(LOSSES["adaptive_kl"](), log_q_TV, log_p_TV)
    expected_T = adaptive_kl(0.5)(log_p_TV.exp(), log_q_TV.exp())
    torch.testing.assert_close(value_T, expected_T, rtol=1e-9, atol=1e-12)
