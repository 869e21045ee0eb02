"""What the chunked loss does beside the divergence: metrics, token weights, dtypes, chunk
sizes, no teacher.
"""

import dataclasses
import math

import pytest
import torch

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES
from kdflow_core.losses.chunked import (
    LossOutput,
    chunk_rows,
    compiled_stage,
    distillation_loss,
)
from kdflow_core.losses.elementwise import Block, LossSpec, block_terms
from kdflow_core.losses.logits import LogitProducer
from kdflow_core.losses.token_weights import Entropy, TeacherConfidence, TokenWeight

TOKENS, VOCABULARY, STUDENT, TEACHER = 21, 53, 8, 12
ROWS = torch.arange(TOKENS)


class Case:
    """Random float64 states and heads, far from uniform."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden_TH = random(TOKENS, STUDENT).requires_grad_()
        self.weight_VH = random(VOCABULARY, STUDENT).requires_grad_()
        self.teacher_TG, self.teacher_VG = random(TOKENS, TEACHER), random(VOCABULARY, TEACHER)
        self.targets_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        self.weights_T = torch.rand(TOKENS, generator=generator, dtype=torch.float64)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Full logits of student and teacher."""
        return self.hidden_TH @ self.weight_VH.T, self.teacher_TG @ self.teacher_VG.T

    def loss(self, spec: LossSpec, head: OutputHead | None = None) -> LossOutput:
        teacher = HiddenSignal(self.teacher_TG, OutputHead(weight_VH=self.teacher_VG))
        return distillation_loss(
            student_hidden_TH=self.hidden_TH,
            student_head=head or OutputHead(weight_VH=self.weight_VH),
            teacher=None if spec.divergence is None else teacher,
            target_ids_T=self.targets_T,
            weights_T=self.weights_T,
            spec=spec,
        )


def spec_of(name: str = "reverse_kl", **fields: object) -> LossSpec:
    spec = LossSpec(divergence=LOSSES[name](), kd_ratio=0.6, logits_bytes=2 * 4 * VOCABULARY * 8)
    return dataclasses.replace(spec, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_metrics_are_of_the_models_own_distributions(temperature: float) -> None:
    """At temperature 1, whatever the divergence's is; they do not depend on the loss."""
    case = Case()
    output = case.loss(spec_of(divergence=LOSSES["reverse_kl"](temperature=temperature)))
    student_TV, teacher_TV = case.logits()
    q, p = (torch.distributions.Categorical(logits=z.detach()) for z in (student_TV, teacher_TV))
    torch.testing.assert_close(output.terms["student_entropy"], q.entropy())
    torch.testing.assert_close(output.terms["teacher_entropy"], p.entropy())
    torch.testing.assert_close(output.terms["forward_kl"], torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(output.terms["cross_entropy"], -q.log_prob(case.targets_T))
    same = student_TV.argmax(-1) == teacher_TV.argmax(-1)
    torch.testing.assert_close(output.terms["agreement"], same.double())
    torch.testing.assert_close(output.loss, output.terms["loss"] @ case.weights_T)


def test_a_student_that_cannot_tell_tokens_apart_agrees_with_nobody() -> None:
    """Of equal logits the first counts, as in evaluation; a tie with all is no agreement."""
    case = Case()
    case.hidden_TH = torch.zeros_like(case.hidden_TH).requires_grad_()
    output = case.loss(spec_of())
    _, teacher_TV = case.logits()
    torch.testing.assert_close(output.terms["agreement"], (teacher_TV.argmax(-1) == 0).double())
    assert output.terms["agreement"].mean() < 0.2


@pytest.mark.parametrize(
    ("rule", "factors"),
    [
        (TeacherConfidence(power=2.0), lambda p, q: p.probs.amax(-1) ** 2),
        (Entropy(of="student", favour="high"), lambda p, q: q.entropy() / math.log(VOCABULARY)),
        (Entropy(of="teacher", favour="low"), lambda p, q: 1 - p.entropy() / math.log(VOCABULARY)),
    ],
)
def test_token_weights_scale_the_divergence_alone(rule: TokenWeight, factors: object) -> None:
    """By a constant: the gradient is that of a divergence with these weights."""
    case = Case()
    output = case.loss(spec_of(token_weight=rule))
    output.loss.backward()
    gradient_TH = case.hidden_TH.grad
    case = Case()
    student_TV, teacher_TV = case.logits()
    p = torch.distributions.Categorical(logits=teacher_TV)
    q = torch.distributions.Categorical(logits=student_TV.detach())
    factor_T = factors(p, q)  # type: ignore[operator]
    q_TV = torch.softmax(student_TV, -1)
    kl_T = (q_TV * (q_TV / p.probs).log()).sum(-1)
    ce_T = -q_TV[ROWS, case.targets_T].log()
    expected = (case.weights_T * (0.4 * ce_T + 0.6 * factor_T * kl_T)).sum()
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient_TH, case.hidden_TH.grad)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    case = Case()
    output = case.loss(spec_of(divergence=None, kd_ratio=0.0))
    student_TV, _ = case.logits()
    expected_T = torch.nn.functional.cross_entropy(student_TV, case.targets_T, reduction="none")
    torch.testing.assert_close(output.loss, expected_T @ case.weights_T)
    leaves = (case.hidden_TH, case.weight_VH)
    pair = (output.loss, expected_T @ case.weights_T)
    for mine, theirs in zip(*(torch.autograd.grad(x, leaves) for x in pair), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (output.terms["kd"] == 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sampled_reverse_kl"}))
def test_bfloat16_gradients_are_near_those_of_the_rounded_values(name: str, device: str) -> None:
    """Logits and sums are float32: what is lost is the rounding of the logit gradient, 2^-9 of each
    of its entries, and of the result. On a GPU this takes products that widen, and fused kernels.
    """
    case, exact = Case(), Case()
    for key in ("hidden_TH", "weight_VH", "teacher_TG", "teacher_VG"):
        rounded = (getattr(case, key).detach() / 3).bfloat16()
        setattr(exact, key, rounded.double().requires_grad_())
        setattr(case, key, rounded.to(device).requires_grad_())
    case.targets_T, case.weights_T = case.targets_T.to(device), case.weights_T.to(device)
    case.loss(spec_of(name)).loss.backward()
    exact.loss(spec_of(name)).loss.backward()
    for key in ("hidden_TH", "weight_VH"):
        mine, theirs = getattr(case, key).grad, getattr(exact, key).grad
        assert mine.dtype == torch.bfloat16
        assert (mine.cpu().double() - theirs).norm() < 0.005 * theirs.norm()


def test_bfloat16_logits_are_float32_and_exact() -> None:
    case = Case()
    hidden_TH, weight_VH = case.hidden_TH.detach().bfloat16(), case.weight_VH.detach().bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    logits_TV = LogitProducer(OutputHead(weight_VH=weight_VH), torch.float32).logits(hidden_TH)
    assert before == torch.backends.mkldnn.matmul.fp32_precision  # left as it was
    assert logits_TV.dtype == torch.float32
    expected_TV = hidden_TH.double() @ weight_VH.double().T
    torch.testing.assert_close(logits_TV.double(), expected_TV, rtol=1e-5, atol=1e-5)


def test_bfloat16_heads_are_widened_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdflow_core.losses.logits.WIDENED_BYTES", 5 * STUDENT * 4)
    case = Case()
    weight_VH, hidden_CH = case.weight_VH.detach().bfloat16(), case.hidden_TH[:1].bfloat16()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                largest = max(largest, out.numel())
            return out

    producer = LogitProducer(OutputHead(weight_VH=weight_VH), torch.float32)
    with Watch():
        logits_TV = producer.logits(hidden_CH)
        producer.hidden_gradient(logits_TV)
    assert largest == 5 * STUDENT


def test_chunks_fill_the_memory_they_are_given() -> None:
    spec = spec_of(logits_bytes=512 * 10**6)
    assert chunk_rows(spec, 152_000, torch.float32) == 421  # 2 x 421 x 152,000 x 4 bytes
    assert chunk_rows(spec_of(divergence=None, kd_ratio=0.0), VOCABULARY, torch.float64) == 8
    assert chunk_rows(spec_of(logits_bytes=1), 152_000, torch.float32) == 1


def test_a_scaled_loss_scales_the_gradient_and_can_be_differentiated_twice_over() -> None:
    case = Case()
    loss = case.loss(spec_of()).loss
    (once,) = torch.autograd.grad(loss, case.hidden_TH, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, case.hidden_TH)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.6])
def test_without_a_teacher_cross_entropy_has_its_part(kd_ratio: float) -> None:
    case = Case()
    whole = case.loss(spec_of(divergence=None, kd_ratio=0.0)).loss
    part = case.loss(spec_of(divergence=None, kd_ratio=kd_ratio)).loss
    torch.testing.assert_close(part, (1 - kd_ratio) * whole)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("name", ["generalized_jsd"])
def test_the_fused_stage_is_the_plain_one(name: str) -> None:
    """As a GPU has it: inductor makes kernels of it (here C++, there Triton), with any shape."""
    divergence = LOSSES[name]()
    spec = spec_of(divergence=divergence, token_weight=TeacherConfidence())
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 9):
        student_BV, teacher_BV = torch.randn(2, tokens, VOCABULARY, generator=generator)
        targets_B = torch.arange(tokens)
        block = Block(student_BV, teacher_BV, targets_B, torch.ones(tokens), None, None)
        for mine, plain in zip(
            compiled_stage()(block, spec), block_terms(block, spec), strict=True
        ):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
