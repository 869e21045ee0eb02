"""The likelihood of spans against ALM's own definition in float64, and its gradient by autograd.

Dimensions: N supervised tokens, V vocabulary, H hidden size, S spans.
"""

from typing import Any

import pytest
import torch

from configs.schema.algorithm import VanillaKDConfig
from kdflow_core.algorithms.base import Ingredients, MicroBatch, Student, TokenBatch, TokenSignal
from kdflow_core.algorithms.vanilla_kd import VanillaKD
from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import Folding
from kdflow_core.losses.span_likelihood import SMALLEST, Spans, span_divergence

TOKENS, TEACHER_TOKENS, IDS, TEACHER_IDS, CLASSES, WIDTH = 7, 6, 13, 17, 5, 4


def binarised(x: torch.Tensor, y: torch.Tensor, tau: float) -> torch.Tensor:
    """The KL of two coins that show heads with p^(1/tau) and q^(1/tau): equation 5 of ALM."""
    p, q = (-x / tau).exp(), (-y / tau).exp()
    rest_p, rest_q = -torch.expm1(-x / tau), -torch.expm1(-y / tau)
    return p * (p / q).log() + rest_p * (rest_p / rest_q).log()


def test_it_is_the_limit_of_alm() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (10 * torch.rand(50, generator=generator, dtype=torch.float64) + 0.01 for _ in range(2))
    value, slope = span_divergence(x, y)
    torch.testing.assert_close(value, 1e4 * binarised(x, y, 1e4), rtol=1e-2, atol=1e-3)
    leaf = y.clone().requires_grad_()
    (x * (x / leaf).log() - x + leaf).sum().backward()
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-12, atol=1e-12)


def test_equal_likelihoods_cost_nothing_and_certain_spans_stay_finite() -> None:
    x = torch.tensor([0.0, 1e-9, 0.5, 30.0], dtype=torch.float64)
    value, slope = span_divergence(x, x)
    assert value.tolist() == [0.0] * 4
    assert slope.tolist() == [0.0] * 4
    value, slope = span_divergence(x, torch.zeros_like(x))
    assert torch.isfinite(value).all()
    assert slope[3] == 1 - 30 / SMALLEST


class Problem:
    """Seven tokens of the student against six of the teacher, in four spans; some rows in none."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.hidden_NH = self.random(TOKENS, WIDTH).requires_grad_()
        self.weight_VH = self.random(IDS, WIDTH).requires_grad_()
        self.teacher_MG = self.random(TEACHER_TOKENS, WIDTH)
        self.teacher_head = OutputHead(weight_VH=self.random(TEACHER_IDS, WIDTH))
        self.targets_N = torch.randint(0, IDS, (TOKENS,), generator=self.generator)
        self.targets_M = torch.randint(0, TEACHER_IDS, (TEACHER_TOKENS,), generator=self.generator)
        self.row_R = torch.tensor([0, 1, 2, 4, 5, 6])
        self.span_R = torch.tensor([0, 0, 1, 2, 2, 3])
        self.span_M = torch.tensor([0, 1, 1, 1, 2, 3])
        self.pair_K = torch.tensor([0, 2, 4, 6])

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def loss(self, **spec: Any) -> Any:
        folding = Folding(
            student_V=torch.arange(IDS) % CLASSES,
            teacher_W=torch.arange(TEACHER_IDS) % CLASSES,
            count=CLASSES,
        )
        head = OutputHead(weight_VH=self.weight_VH)
        made = VanillaKD(
            VanillaKDConfig(),
            Ingredients(
                spec=LossSpec(
                    divergence=LOSSES["forward_kl"](), logits_bytes=10**5, folding=folding, **spec
                ),
                model=None,  # type: ignore[arg-type]
                heads={"teacher": self.teacher_head},
                vocabulary_size=IDS,
            ),
        )
        spans = Spans(
            count=4,
            row_R=self.row_R,
            span_R=self.span_R,
            hidden_MG=self.teacher_MG,
            target_ids_M=self.targets_M,
            span_M=self.span_M,
            is_pair_S=torch.tensor([True, True, True, True]),
        )
        nothing = torch.zeros(0, dtype=torch.long)
        batch = MicroBatch(
            student=TokenBatch(ids_BT=nothing, row_N=nothing, position_N=nothing),
            target_ids_N=self.targets_N,
            weight=0.25,
            signals=(
                TokenSignal(
                    index_K=self.pair_K,
                    rest_R=torch.tensor([1, 3, 5]),
                    signal=HiddenSignal(self.teacher_MG[:4], self.teacher_head),
                    spans=spans,
                ),
            ),
            teacher_tokens=None,
            sampled_log_prob_N=None,
            advantage_N=None,
        )
        student = Student(model=None, hidden_NH=self.hidden_NH, head=head)  # type: ignore[arg-type]
        return made.loss(student, batch)

    def naive(self, kd_ratio: float, span_share: float) -> torch.Tensor:
        log_q_NV = (self.hidden_NH @ self.weight_VH.T).log_softmax(-1)
        log_p_MW = (self.teacher_MG @ self.teacher_head.weight_VH.T).log_softmax(-1)
        ce_N = -log_q_NV.gather(-1, self.targets_N[:, None]).squeeze(-1)
        log_p_M = log_p_MW.gather(-1, self.targets_M[:, None]).squeeze(-1)
        total = (1 - kd_ratio) * ce_N.sum()
        for place, row in enumerate(self.pair_K):
            q, p = (
                torch.stack([z.exp()[k::CLASSES].sum() for k in range(CLASSES)])
                for z in (log_q_NV[row], log_p_MW[place])
            )
            total = total + kd_ratio * (1 - span_share) * (p * (p / q).log()).sum()
        for span in range(4):
            y = ce_N[self.row_R[self.span_R == span]].sum()
            x = -log_p_M[self.span_M == span].sum()
            total = total + kd_ratio * span_share * (x * (x / y).log() - x + y)
        return 0.25 * total


@pytest.mark.parametrize(("kd_ratio", "span_share"), [(0.9, 0.5), (0.6, 1.0), (1.0, 0.25)])
def test_value_and_gradient_with_classes_and_cross_entropy(
    kd_ratio: float, span_share: float
) -> None:
    problem = Problem()
    leaves = [problem.hidden_NH, problem.weight_VH]
    output = problem.loss(kd_ratio=kd_ratio, span_share=span_share)
    expected = problem.naive(kd_ratio, span_share)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    for own, wanted in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-7)
    terms = output.terms
    assert len(terms["span"]) == 4
    assert len(terms["cross_entropy"]) == TOKENS
    assert len(terms["kd"]) == 4
    # Means of the metrics: the loss over tokens, and what it consists of.
    torch.testing.assert_close(terms["loss"].sum() * 0.25, expected.detach(), rtol=1e-6, atol=1e-7)
