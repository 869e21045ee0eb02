"""The loss over two vocabularies against the merged problem, in float64 by autograd.

Dimensions: T tokens, V and W vocabularies of student and teacher, K classes.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.folding import Folding, ranks
from tests.numerics.definitions import generalized_jsd, kl

TOKENS, STUDENT_IDS, TEACHER_IDS, CLASSES = 11, 23, 31, 9
WIDTHS = (6, 8)
DEFINITIONS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "generalized_jsd": generalized_jsd(0.5),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "skewed_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
}


class Problem:
    """Random states and heads; a class without a teacher's token is among the classes."""

    def __init__(self, seed: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden_TH = self.random(TOKENS, WIDTHS[0]).requires_grad_()
        self.weight_VH = self.random(STUDENT_IDS, WIDTHS[0]).requires_grad_()
        self.teacher_TG = self.random(TOKENS, WIDTHS[1])
        self.teacher_WG = self.random(TEACHER_IDS, WIDTHS[1])
        self.targets_T = torch.randint(0, STUDENT_IDS, (TOKENS,), generator=self.generator)
        self.weights_T = torch.rand(TOKENS, generator=self.generator, dtype=torch.float64)
        self.student_V = self.classes(STUDENT_IDS)
        self.teacher_W = self.classes(TEACHER_IDS)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def classes(self, ids: int) -> torch.Tensor:
        own = torch.randint(0, CLASSES, (ids,), generator=self.generator)
        own[:CLASSES] = torch.arange(CLASSES)
        return own[torch.randperm(ids, generator=self.generator)]

    @property
    def folding(self) -> Folding:
        return Folding(student_V=self.student_V, teacher_W=self.teacher_W, count=CLASSES)

    def loss(self, spec: LossSpec) -> LossOutput:
        return distillation_loss(
            student_hidden_TH=self.hidden_TH,
            student_head=OutputHead(weight_VH=self.weight_VH),
            teacher=HiddenSignal(self.teacher_TG, OutputHead(weight_VH=self.teacher_WG)),
            target_ids_T=self.targets_T,
            weights_T=self.weights_T,
            spec=spec,
        )

    def merged(self, kd_ratio: float, name: str, temperature: float) -> torch.Tensor:
        """The sum of weighted losses, from probabilities of classes that are added up by hand."""
        z_TV = self.hidden_TH @ self.weight_VH.T
        q_TK = torch.zeros(TOKENS, CLASSES, dtype=torch.float64)
        q_TK = q_TK.index_add(1, self.student_V, z_TV.softmax(-1))
        p_TW = (self.teacher_TG @ self.teacher_WG.T).softmax(-1)
        p_TK = torch.zeros_like(q_TK).index_add(1, self.teacher_W, p_TW)
        q_TK, p_TK = ((x.log() / temperature).softmax(-1) for x in (q_TK, p_TK))
        ce_T = -z_TV.log_softmax(-1).gather(-1, self.targets_T[:, None]).squeeze(-1)
        kd_T = DEFINITIONS[name](p_TK, q_TK)
        return (self.weights_T * ((1 - kd_ratio) * ce_T + kd_ratio * kd_T)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_value_and_gradient_are_those_of_the_merged_problem(
    name: str, kd_ratio: float, temperature: float
) -> None:
    problem = Problem()
    leaves = [problem.hidden_TH, problem.weight_VH]
    spec = LossSpec(
        divergence=LOSSES[name](temperature=temperature),
        kd_ratio=kd_ratio,
        logits_bytes=STUDENT_IDS * 8 * 2 * 4,
        folding=problem.folding,
    )
    output = problem.loss(spec)
    expected = problem.merged(kd_ratio, name, temperature)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    for own, wanted in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-12)


def test_terms_compare_classes_and_count_the_students_own_tokens() -> None:
    problem = Problem()
    spec = LossSpec(
        divergence=LOSSES["reverse_kl"](),
        kd_ratio=0.5,
        logits_bytes=10**6,
        folding=problem.folding,
    )
    terms = problem.loss(spec).terms
    z_TV = problem.hidden_TH.detach() @ problem.weight_VH.detach().T
    q_TV = z_TV.softmax(-1)
    p_TW = (problem.teacher_TG @ problem.teacher_WG.T).softmax(-1)
    q_TK = torch.zeros(TOKENS, CLASSES, dtype=torch.float64).index_add(1, problem.student_V, q_TV)
    p_TK = torch.zeros_like(q_TK).index_add(1, problem.teacher_W, p_TW)
    expected = {
        "kd": kl(q_TK, p_TK),
        "forward_kl": kl(p_TK, q_TK),
        "teacher_entropy": -(p_TK * p_TK.log()).sum(-1),
        "student_entropy": -(q_TV * q_TV.log()).sum(-1),
        "cross_entropy": -q_TV.log().gather(-1, problem.targets_T[:, None]).squeeze(-1),
        "agreement": (p_TK.argmax(-1) == q_TK.argmax(-1)).double(),
    }
    for name, value_T in expected.items():
        torch.testing.assert_close(terms[name], value_T, rtol=1e-12, atol=1e-12)


def test_the_order_of_a_vocabulary_changes_nothing() -> None:
    losses = []
    for seed in (None, 1, 2):
        problem = Problem()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order_W = torch.randperm(TEACHER_IDS, generator=generator)
            problem.teacher_WG, problem.teacher_W = (
                x[order_W] for x in (problem.teacher_WG, problem.teacher_W)
            )
            order_V = torch.randperm(STUDENT_IDS, generator=generator)
            problem.weight_VH = problem.weight_VH.detach()[order_V].requires_grad_()
            problem.student_V = problem.student_V[order_V]
            problem.targets_T = torch.argsort(order_V)[problem.targets_T]
        spec = LossSpec(
            divergence=LOSSES["generalized_jsd"](),
            kd_ratio=0.5,
            logits_bytes=10**6,
            folding=problem.folding,
        )
        losses.append(problem.loss(spec).loss)
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=1e-13, atol=0.0)


def test_classes_that_one_side_lacks_and_far_tokens_stay_finite() -> None:
    problem = Problem()
    problem.teacher_W = torch.where(problem.teacher_W == 4, 5, problem.teacher_W)
    problem.teacher_WG = problem.teacher_WG * 400  # differences of hundreds of nats
    spec = LossSpec(
        divergence=LOSSES["forward_kl"](),
        kd_ratio=1.0,
        logits_bytes=10**6,
        folding=problem.folding,
    )
    output = problem.loss(spec)
    gradients = torch.autograd.grad(output.loss, [problem.hidden_TH, problem.weight_VH])
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_heads_and_classes_of_different_sizes_are_refused() -> None:
    problem = Problem()
    problem.teacher_WG = problem.teacher_WG[:-1]
    spec = LossSpec(
        divergence=LOSSES["forward_kl"](),
        kd_ratio=1.0,
        logits_bytes=10**6,
        folding=problem.folding,
    )
    with pytest.raises(ValueError, match=r"the classes are of \(23, 31\)"):
        problem.loss(spec)


@pytest.mark.parametrize("sizes", [(STUDENT_IDS, TEACHER_IDS), (TEACHER_IDS, STUDENT_IDS)])
def test_ranks_are_uld_whatever_the_tokens_are_called(sizes: tuple[int, int]) -> None:
    """The sum of absolute differences of sorted probabilities, by TRL's ULD and autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental"
        from trl.experimental.gold.gold_trainer import ULDLoss
    problem = Problem()
    problem.weight_VH = problem.random(sizes[0], WIDTHS[0]).requires_grad_()
    problem.targets_T %= sizes[0]
    teacher_WG = problem.random(sizes[1], WIDTHS[1])
    leaves = [problem.hidden_TH, problem.weight_VH]
    spec = LossSpec(
        divergence=LOSSES["total_variation"](),
        kd_ratio=1.0,
        logits_bytes=10**4,
        folding=ranks(sizes, torch.zeros(0, 2, dtype=torch.int64), torch.device("cpu")),
    )
    q_TV = (problem.hidden_TH @ problem.weight_VH.T).softmax(-1)
    p_TW = (problem.teacher_TG @ teacher_WG.T).softmax(-1)
    without_matches = SimpleNamespace(
        _teacher_matched_ids=set(), hybrid_matched_weight=0.0, hybrid_unmatched_weight=1.0
    )
    rows = [
        ULDLoss._compute_hybrid_uld_loss(without_matches, q_TV[t : t + 1], p_TW[t : t + 1])
        for t in range(TOKENS)
    ]
    expected = (problem.weights_T * torch.stack(rows)).sum() / 2
    wanted = torch.autograd.grad(expected, leaves)
    for order_W in (torch.arange(sizes[1]), torch.randperm(sizes[1])):
        problem.teacher_WG = teacher_WG[order_W]
        output = problem.loss(spec)
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
        for own, other in zip(torch.autograd.grad(output.loss, leaves), wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
