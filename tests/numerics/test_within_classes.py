"""Reverse KL of classes with what is left inside them: its expected gradient, by enumeration, is
that of the reverse KL over whole runs of tokens.

The student's tokens are h, el, hel, lo, ello, the teacher's hel, lo, h, hello. The student spells
"hel" in two ways; the teacher reads every text in one token. Dimensions: R rows of the student, K
tokens of a run, V and W ids of student and teacher, H and G hidden sizes.
"""

import math
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
from kdflow_core.losses.span_likelihood import Spans
from kdflow_core.losses.within_classes import CLIP

H, EL, HEL, LO, ELLO = range(5)
T_HEL, T_LO, T_H, T_HELLO = range(4)
# What begins with h is one class, lo one, and what begins no text here another.
CLASSES = Folding(
    student_V=torch.tensor([0, 2, 0, 1, 2]), teacher_W=torch.tensor([0, 1, 0, 0]), count=3
)
RUNS = {(HEL,): T_HEL, (H, EL): T_HEL, (H, ELLO): T_HELLO, (LO,): T_LO}
WIDTH = 6


class Toy:
    """Random states; at the first token el and ello have no mass, behind h all but they."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.hidden_RH = draw(2, WIDTH).requires_grad_()
        self.weight_VH = draw(5, WIDTH).requires_grad_()
        self.bias_V = torch.zeros(5, dtype=torch.float64)
        self.teacher_1G = draw(1, WIDTH)
        self.teacher_WG = draw(4, WIDTH)

    def log_q(self) -> torch.Tensor:
        """Of both rows; the masks stand for a model that has learned where it is."""
        logits = self.hidden_RH @ self.weight_VH.T
        return (logits + MASK_RV).log_softmax(-1)

    def log_p(self) -> torch.Tensor:
        return (self.teacher_1G @ self.teacher_WG.T).log_softmax(-1)[0]

    def loss(self, run: tuple[int, ...], sampled_K: torch.Tensor, **changed: Any) -> Any:
        # The masks as a further dimension of the states, which the head reads.
        states = torch.cat([self.hidden_RH, torch.eye(2, dtype=torch.float64)], -1)[: len(run)]
        weight = torch.cat([self.weight_VH, MASK_RV.T], -1)
        teacher = OutputHead(weight_VH=self.teacher_WG)
        made = VanillaKD(
            VanillaKDConfig(),
            Ingredients(
                spec=LossSpec(
                    divergence=LOSSES["reverse_kl"](),
                    kd_ratio=1.0,
                    logits_bytes=10**5,
                    folding=changed.get("folding", CLASSES),
                    within_classes=True,
                ),
                model=None,  # type: ignore[arg-type]
                heads={"teacher": teacher},
                vocabulary_size=5,
            ),
        )
        nothing = torch.zeros(0, dtype=torch.long)
        spans = Spans(
            count=1,
            row_R=torch.arange(len(run)),
            span_R=torch.zeros(len(run), dtype=torch.long),
            hidden_MG=self.teacher_1G,
            target_ids_M=torch.tensor([RUNS[run]]),
            span_M=torch.tensor([0]),
            is_pair_S=torch.tensor([changed.get("is_pair", True)]),
        )
        batch = MicroBatch(
            student=TokenBatch(ids_BT=nothing, row_N=nothing, position_N=nothing),
            target_ids_N=torch.tensor(run),
            weight=1.0,
            signals=(
                TokenSignal(
                    index_K=torch.tensor([0]),
                    rest_R=torch.arange(1, len(run)),
                    signal=HiddenSignal(self.teacher_1G, teacher),
                    spans=spans,
                ),
            ),
            teacher_tokens=None,
            sampled_log_prob_N=sampled_K,
            advantage_N=None,
        )
        student = Student(
            model=None,  # type: ignore[arg-type]
            hidden_NH=states,
            head=OutputHead(weight_VH=weight),
        )
        return made.loss(student, batch)

    def gradients(self, value: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(value, [self.hidden_RH, self.weight_VH]))


MASK_RV = torch.full((2, 5), -60.0, dtype=torch.float64)
MASK_RV[0, [H, HEL, LO]] = 0
MASK_RV[1, [EL, ELLO]] = 0


def tokens_log_q(log_q_RV: torch.Tensor, run: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([log_q_RV[place, token] for place, token in enumerate(run)])


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_is_that_of_the_reverse_kl_over_runs(seed: int) -> None:
    toy = Toy(seed)
    log_q_RV, log_p_W = toy.log_q(), toy.log_p()
    wanted = torch.zeros((), dtype=torch.float64)
    expected = [torch.zeros_like(toy.hidden_RH), torch.zeros_like(toy.weight_VH)]
    value = 0.0
    for run, text in RUNS.items():
        log_q_K = tokens_log_q(log_q_RV, run)
        q = log_q_K.sum().exp()
        wanted = wanted + q * (log_q_K.sum() - log_p_W[text])
        output = toy.loss(run, log_q_K.detach())
        value += float(q.detach()) * float(output.loss.detach())
        for total, own in zip(expected, toy.gradients(output.loss), strict=True):
            total += q.detach() * own
    assert value == pytest.approx(float(wanted.detach()), rel=1e-9)
    for own, right in zip(expected, toy.gradients(wanted), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-6, atol=1e-9)


def test_without_it_the_ways_to_spell_a_text_are_not_learned() -> None:
    """Where both sides begin in different classes, or not with a pair, only the classes count."""
    toy = Toy()
    run = (H, ELLO)
    sampled_K = tokens_log_q(toy.log_q(), run).detach()
    apart = Folding(
        student_V=CLASSES.student_V, teacher_W=torch.tensor([0, 1, 0, 1]), count=CLASSES.count
    )
    for changed in ({"is_pair": False}, {"folding": apart}):
        output = toy.loss(run, sampled_K, **changed)
        assert output.terms["within_classes"].tolist() == [0.0]
        hidden_RH, _ = toy.gradients(output.loss)
        assert hidden_RH[1].abs().max() == 0
        assert hidden_RH[0].abs().max() > 0
    hidden_RH, _ = toy.gradients(toy.loss(run, sampled_K).loss)
    assert hidden_RH[1].abs().max() > 0


def test_a_sample_of_older_weights_counts_by_its_ratio_and_is_clipped() -> None:
    toy = Toy()
    run = (H, EL)
    now_K = tokens_log_q(toy.log_q(), run).detach()
    base = toy.gradients(toy.loss(run, now_K).loss)[0][1]
    advantage = -float(toy.loss(run, now_K).terms["within_classes"][0])
    inside = 1 + 0.5 * CLIP
    scaled = toy.gradients(toy.loss(run, now_K - math.log(inside)).loss)[0][1]
    torch.testing.assert_close(scaled, inside * base, rtol=1e-6, atol=1e-12)
    beyond = (1 + 2 * CLIP) if advantage > 0 else (1 - 2 * CLIP)
    clipped = toy.gradients(toy.loss(run, now_K - math.log(beyond)).loss)[0][1]
    assert clipped.abs().max() == 0
