"""The chunked loss against a float64 definition over full logits, differentiated by autograd."""

import pytest
import torch

from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses import LOSSES, chunked
from kdflow_core.losses.chunked import LossOutput, distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from tests.numerics.definitions import CASES, generalized_jsd, kl

DEFINITIONS = {name: definition for name, fields, definition in CASES if not fields}
DEFINITIONS["generalized_jsd"] = generalized_jsd(0.5)
DEFINITIONS["skewed_kl"] = lambda p, q: kl(p, 0.1 * p + 0.9 * q)
DEFINITIONS["skewed_reverse_kl"] = lambda p, q: kl(q, 0.9 * p + 0.1 * q)
TOKENS, VOCABULARY, STUDENT, TEACHER = 13, 29, 6, 9


class Problem:
    """Random states, heads, targets and weights; some tokens have weight zero."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float64,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden_TH = random(TOKENS, STUDENT).requires_grad_()
        self.weight_VH = random(VOCABULARY, STUDENT).requires_grad_()
        self.bias_V = random(VOCABULARY).requires_grad_() if bias else None
        self.teacher_hidden_TG = random(TOKENS, TEACHER)
        self.scale, self.softcap = scale, softcap
        self.teacher_head = OutputHead(
            weight_VH=random(VOCABULARY, TEACHER), logit_scale=scale, softcap=softcap
        )
        self.targets_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        self.weights_T = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
        self.weights_T[::4] = 0

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.hidden_TH, self.weight_VH, self.bias_V) if t is not None]

    def chunked(self, spec: LossSpec) -> LossOutput:
        head = OutputHead(
            weight_VH=self.weight_VH,
            bias_V=self.bias_V,
            logit_scale=self.scale,
            softcap=self.softcap,
        )
        return distillation_loss(
            student_hidden_TH=self.hidden_TH,
            student_head=head,
            teacher=HiddenSignal(self.teacher_hidden_TG, self.teacher_head),
            target_ids_T=self.targets_T,
            weights_T=self.weights_T,
            spec=spec,
        )

    def definition(self, spec: LossSpec, name: str) -> torch.Tensor:
        """sum_t w_t [(1-r) CE_t + r (T^2) D_t], straight from the formulas, on full logits."""

        def capped(logits_TV: torch.Tensor) -> torch.Tensor:
            logits_TV = logits_TV * self.scale
            if self.softcap is None:
                return logits_TV
            return self.softcap * torch.tanh(logits_TV / self.softcap)

        z_TV = self.hidden_TH.double() @ self.weight_VH.double().T
        if self.bias_V is not None:
            z_TV = z_TV + self.bias_V.double()
        z_TV = capped(z_TV)
        y_TV = capped(self.teacher_hidden_TG.double() @ self.teacher_head.weight_VH.double().T)
        temperature = spec.divergence.temperature
        q_TV, p_TV = torch.softmax(z_TV / temperature, -1), torch.softmax(y_TV / temperature, -1)
        divergence_T = DEFINITIONS[name](p_TV, q_TV)
        if spec.divergence.scale_by_temperature_squared:
            divergence_T = divergence_T * temperature**2
        ce_T = -torch.softmax(z_TV, -1)[torch.arange(TOKENS), self.targets_T].log()
        mixed_T = (1 - spec.kd_ratio) * ce_T + spec.kd_ratio * divergence_T
        return (self.weights_T * mixed_T).sum()


def spec_of(
    name: str,
    *,
    chunk: int = 4,
    ratio: float = 0.7,
    temperature: float = 1.0,
    vocabulary: int = VOCABULARY,
    itemsize: int = 8,
) -> LossSpec:
    """A loss that takes `chunk` tokens at a time."""
    divergence = LOSSES[name](
        temperature=temperature, scale_by_temperature_squared=temperature != 1.0
    )
    return LossSpec(
        divergence=divergence, kd_ratio=ratio, logits_bytes=2 * chunk * vocabulary * itemsize
    )


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 1.5, "bias": True, "scale": 1.7}],
    ids=["plain", "bias", "scale", "softcap"],
)
def test_value_and_gradients_are_the_definitions(
    name: str, chunk: int, ratio: float, temperature: float, head: dict[str, float]
) -> None:
    spec = spec_of(name, chunk=chunk, ratio=ratio, temperature=temperature)
    ours, witness = Problem(**head), Problem(**head)  # type: ignore[arg-type]
    loss, expected = ours.chunked(spec).loss, witness.definition(spec, name)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for mine, theirs in zip(ours.leaves, witness.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [1, 3, 4, 5])
def test_blocks_of_a_chunk_do_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("generalized_jsd", chunk=8, temperature=2.0)
    ours, witness = Problem(softcap=1.5, bias=True), Problem(softcap=1.5, bias=True)
    expected = witness.definition(spec, "generalized_jsd")
    monkeypatch.setattr(chunked, "_block_rows", lambda *_: block)
    loss = ours.chunked(spec).loss
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(ours.leaves, witness.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


# The weights of adaptive_kl are constants to its gradient, but not to a difference quotient.
@pytest.mark.parametrize("name", sorted(DEFINITIONS.keys() - {"adaptive_kl"}))
def test_gradcheck(name: str) -> None:
    problem = Problem(bias=True, softcap=2.0)
    spec = spec_of(name, temperature=1.3)

    def loss(
        hidden_TH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor
    ) -> torch.Tensor:
        problem.hidden_TH, problem.weight_VH, problem.bias_V = hidden_TH, weight_VH, bias_V
        return problem.chunked(spec).loss

    assert torch.autograd.gradcheck(loss, tuple(problem.leaves))


def test_bfloat16_inputs_lose_only_their_own_rounding() -> None:
    """The loss of bfloat16 states equals float64 arithmetic on the same (rounded) values."""
    spec = spec_of("forward_kl")
    problem = Problem(dtype=torch.bfloat16)
    expected = problem.definition(spec, "forward_kl")
    # float32 arithmetic over 29 values: far below bfloat16's 2^-9 = 2e-3.
    torch.testing.assert_close(problem.chunked(spec).loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_token_of_weight_zero_is_an_absent_token() -> None:
    spec = spec_of("forward_kl")
    whole, part = Problem(), Problem()
    kept = part.weights_T > 0
    for name in ("teacher_hidden_TG", "targets_T", "weights_T"):
        setattr(part, name, getattr(part, name)[kept])
    part.hidden_TH = part.hidden_TH.detach()[kept].requires_grad_()
    whole.chunked(spec).loss.backward()
    part.chunked(spec).loss.backward()
    torch.testing.assert_close(whole.weight_VH.grad, part.weight_VH.grad)
    assert whole.hidden_TH.grad is not None
    assert (whole.hidden_TH.grad[~kept] == 0).all()


def test_no_token_at_all_gives_zero_loss_and_gradient() -> None:
    problem = Problem()
    problem.hidden_TH = problem.hidden_TH.detach()[:0].requires_grad_()
    problem.teacher_hidden_TG = problem.teacher_hidden_TG[:0]
    problem.targets_T, problem.weights_T = problem.targets_T[:0], problem.weights_T[:0]
    output = problem.chunked(spec_of("reverse_kl"))
    output.loss.backward()
    assert output.loss == 0
    assert problem.weight_VH.grad is not None
    assert (problem.weight_VH.grad == 0).all()


def test_student_equal_to_teacher_has_no_divergence() -> None:
    problem = Problem()
    head = OutputHead(weight_VH=problem.weight_VH)
    output = distillation_loss(
        student_hidden_TH=problem.hidden_TH,
        student_head=head,
        teacher=HiddenSignal(
            problem.hidden_TH.detach(), OutputHead(weight_VH=problem.weight_VH.detach())
        ),
        target_ids_T=problem.targets_T,
        weights_T=problem.weights_T,
        spec=spec_of("forward_kl", ratio=1.0),
    )
    output.loss.backward()
    assert abs(output.loss.item()) < 1e-12
    assert (output.terms["agreement"] == 1).all()
    assert problem.hidden_TH.grad is not None
    assert problem.hidden_TH.grad.abs().max() < 1e-12


def test_mismatched_rows_are_refused() -> None:
    problem = Problem()
    problem.teacher_hidden_TG = problem.teacher_hidden_TG[1:]
    with pytest.raises(ValueError, match="13 student rows"):
        problem.chunked(spec_of("forward_kl"))


def test_different_vocabularies_are_refused() -> None:
    problem = Problem()
    problem.teacher_head = OutputHead(weight_VH=problem.teacher_head.weight_VH[1:])
    with pytest.raises(ValueError, match="29 tokens, the teacher's 28"):
        problem.chunked(spec_of("forward_kl"))


def test_never_more_than_a_chunk_of_logits() -> None:
    """No tensor as large as the full logits is ever allocated."""
    tokens, vocabulary, hidden, chunk = 512, 4000, 8, 16
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    weight_VH = torch.randn(vocabulary, hidden, requires_grad=True)
    hidden_TH = torch.randn(tokens, hidden, requires_grad=True)
    with Watch():
        output = distillation_loss(
            student_hidden_TH=hidden_TH,
            student_head=OutputHead(weight_VH=weight_VH),
            teacher=HiddenSignal(
                torch.randn(tokens, hidden), OutputHead(weight_VH=torch.randn(vocabulary, hidden))
            ),
            target_ids_T=torch.zeros(tokens, dtype=torch.long),
            weights_T=torch.ones(tokens),
            spec=spec_of("forward_kl", chunk=chunk, vocabulary=vocabulary, itemsize=4),
        )
        output.loss.backward()
    assert largest == chunk * vocabulary


def test_a_frozen_head_gets_no_gradient_and_the_states_get_theirs() -> None:
    spec = spec_of("forward_kl")
    free, frozen = Problem(), Problem()
    frozen.weight_VH = frozen.weight_VH.detach()
    free.chunked(spec).loss.backward()
    frozen.chunked(spec).loss.backward()
    assert frozen.weight_VH.grad is None
    torch.testing.assert_close(frozen.hidden_TH.grad, free.hidden_TH.grad)


def test_a_bias_alone_can_be_trained() -> None:
    spec = spec_of("forward_kl")
    free, frozen = Problem(bias=True), Problem(bias=True)
    frozen.weight_VH, frozen.hidden_TH = frozen.weight_VH.detach(), frozen.hidden_TH.detach()
    free.chunked(spec).loss.backward()
    frozen.chunked(spec).loss.backward()
    assert free.bias_V is not None
    assert frozen.bias_V is not None
    torch.testing.assert_close(frozen.bias_V.grad, free.bias_V.grad)
