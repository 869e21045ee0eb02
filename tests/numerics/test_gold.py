"""GOLD's comparison against TRL's own: values, and gradients by autograd, in float64.

Dimensions: N supervised tokens, M the teacher's, V and W vocabularies, H and G hidden sizes, O
tokens that both vocabularies have, S spans.
"""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema.algorithm import GoldConfig
from kdflow_core.algorithms.base import Ingredients, MicroBatch, Student, TokenBatch, TokenSignal
from kdflow_core.algorithms.gold import Gold
from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.span_likelihood import Spans

WIDTH, BETA = 5, 0.3
# Runs of rows of student and teacher that spell the same; row 5 of the student is in none.
SPANS = (((0, 1, 2), (0,)), ((3,), (1,)), ((4,), (2, 3)), ((6, 7), (4, 5, 6)))
TOKENS, TEACHER_TOKENS = 8, 7


def trls_hybrid_loss(
    shared_O2: torch.Tensor, beta: float = 0.5, weight: float | None = None
) -> Any:
    """TRL 1.16.0's loss object, told which tokens match."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its interface may change
        from trl.experimental.gold.gold_trainer import ULDLoss

    made = ULDLoss(
        SimpleNamespace(
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            use_extended_uld=True,
            uld_token_merge_strategy="bayesian",
            uld_use_hybrid_loss=True,
            uld_hybrid_matched_weight=weight,
            uld_hybrid_unmatched_weight=None if weight is None else 1 - weight,
            beta=beta,
        )
    )
    own_O, other_O = shared_O2.T
    made._vocab_mapping = dict(zip(other_O.tolist(), own_O.tolist(), strict=True))
    made._teacher_matched_ids = set(other_O.tolist())
    made._student_matched_ids = set(own_O.tolist())
    made.mapping_tensor = torch.full((int(other_O.max()) + 1,), -1)
    made.mapping_tensor[other_O] = own_O
    return made


class Comparison:
    """Random states and heads of two vocabularies that have six tokens in common."""

    def __init__(
        self, sizes: tuple[int, int], matched_weight: float | None, spans: Any = SPANS
    ) -> None:
        self.spans = spans
        self.generator = torch.Generator().manual_seed(2)
        self.sizes, self.matched_weight = sizes, matched_weight
        self.hidden_NH = self.random(TOKENS, WIDTH).requires_grad_()
        self.weight_VH = self.random(sizes[0], WIDTH).requires_grad_()
        self.teacher_MG = self.random(TEACHER_TOKENS, WIDTH)
        self.teacher_WG = self.random(sizes[1], WIDTH)
        self.targets_N = torch.randint(0, sizes[0], (TOKENS,), generator=self.generator)
        self.targets_M = torch.randint(0, sizes[1], (TEACHER_TOKENS,), generator=self.generator)
        self.shared_O2 = torch.stack(
            [torch.randperm(size, generator=self.generator)[:6] for size in sizes], 1
        )

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def ours(self, kd_ratio: float, logits_bytes: int) -> Any:
        teacher_head = OutputHead(weight_VH=self.teacher_WG)
        made = Gold(
            GoldConfig(beta=BETA, matched_weight=self.matched_weight),
            Ingredients(
                spec=LossSpec(
                    divergence=LOSSES["forward_kl"](), kd_ratio=kd_ratio, logits_bytes=logits_bytes
                ),
                model=None,  # type: ignore[arg-type]
                heads={"teacher": teacher_head},
                vocabulary_size=self.sizes[0],
                shared_O2=lambda: self.shared_O2,
            ),
        )
        own = [(row, span) for span, (rows, _) in enumerate(self.spans) for row in rows]
        other = [span for span, (_, rows) in enumerate(self.spans) for _ in rows]
        row_R, span_R = torch.tensor(own).reshape(-1, 2).long().T.contiguous()
        nothing = torch.zeros(0, dtype=torch.long)
        spans = Spans(
            count=len(self.spans),
            row_R=row_R,
            span_R=span_R,
            hidden_MG=self.teacher_MG[: len(other)],
            target_ids_M=self.targets_M[: len(other)],
            span_M=torch.tensor(other).long(),
            is_pair_S=torch.ones(len(self.spans), dtype=torch.bool),
        )
        signal = TokenSignal(
            index_K=nothing,
            rest_R=torch.arange(TOKENS),
            signal=HiddenSignal(self.teacher_MG[:0], teacher_head),
            spans=spans,
        )
        batch = MicroBatch(
            student=TokenBatch(ids_BT=nothing, row_N=nothing, position_N=nothing),
            target_ids_N=self.targets_N,
            weight=0.25,
            signals=(signal,),
            teacher_tokens=None,
            sampled_log_prob_N=None,
            advantage_N=None,
        )
        student = Student(
            model=None,  # type: ignore[arg-type]
            hidden_NH=self.hidden_NH,
            head=OutputHead(weight_VH=self.weight_VH),
        )
        return made.loss(student, batch)

    def trls(self, kd_ratio: float) -> torch.Tensor:
        trl = trls_hybrid_loss(self.shared_O2, BETA, self.matched_weight)
        z_NV = self.hidden_NH @ self.weight_VH.T
        own = trl._merge_probabilities_with_alignment_groups(
            z_NV.softmax(-1), [list(rows) for rows, _ in self.spans], self.targets_N.tolist()
        )
        other = trl._merge_probabilities_with_alignment_groups(
            (self.teacher_MG @ self.teacher_WG.T).softmax(-1),
            [list(rows) for _, rows in self.spans],
            self.targets_M.tolist(),
        )
        # It divides by the spans, we by the tokens of a step.
        hybrid = trl._compute_hybrid_uld_loss(own, other) * len(self.spans)
        ce = torch.nn.functional.cross_entropy(z_NV, self.targets_N, reduction="sum")
        return 0.25 * ((1 - kd_ratio) * ce + kd_ratio * hybrid)


@pytest.mark.parametrize("logits_bytes", [10**6, 1])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.6])
@pytest.mark.parametrize("matched_weight", [None, 0.7])
@pytest.mark.parametrize("sizes", [(9, 14), (14, 9)])
def test_value_and_gradient_are_trls(
    sizes: tuple[int, int], matched_weight: float | None, kd_ratio: float, logits_bytes: int
) -> None:
    """Whichever vocabulary is larger, whatever a chunk has room for."""
    problem = Comparison(sizes, matched_weight)
    leaves = [problem.hidden_NH, problem.weight_VH]
    output, expected = problem.ours(kd_ratio, logits_bytes), problem.trls(kd_ratio)
    # TRL raises probabilities to 1e-8 before it takes logarithms.
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-9)
    for own, wanted in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(0.25 * output.terms["loss"].sum(), output.loss.detach())


def test_without_spans_there_is_cross_entropy_alone() -> None:
    problem = Comparison((9, 14), None, spans=())
    output = problem.ours(0.6, 10**6)
    z_NV = problem.hidden_NH @ problem.weight_VH.T
    ce = torch.nn.functional.cross_entropy(z_NV, problem.targets_N, reduction="sum")
    torch.testing.assert_close(output.loss, 0.25 * 0.4 * ce)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_span_that_one_side_finds_impossible_stays_finite(side: str) -> None:
    """In float32, where the probability of its first tokens is none."""
    problem = Comparison((9, 14), None)
    with torch.no_grad():
        rows = problem.hidden_NH[:2] if side == "student" else problem.teacher_MG[4:6]
        rows *= 200
    for name in ("hidden_NH", "weight_VH", "teacher_MG", "teacher_WG"):
        setattr(problem, name, getattr(problem, name).detach().float().requires_grad_())
    output = problem.ours(0.6, 10**6)
    assert torch.isfinite(output.loss)
    for gradient in torch.autograd.grad(output.loss, [problem.hidden_NH, problem.weight_VH]):
        assert torch.isfinite(gradient).all()
