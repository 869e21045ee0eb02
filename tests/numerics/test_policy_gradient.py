"""A reward's policy gradient in the loss, against PPO's definition in float64 and autograd."""

import pytest
import torch

from kdflow_core.algorithms.base import MicroBatch, Student, TokenBatch, TokenSignal, taught_loss
from kdflow_core.contracts import HiddenSignal, OutputHead
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.reverse_kl import ReverseKL
from kdflow_core.losses.surrogate import PolicyGradient

T, V, H = 40, 23, 7
LOW, HIGH, WEIGHT = 0.1, 0.3, 0.7


@pytest.mark.parametrize("kd_ratio", [1.0, 0.6])
def test_a_reward_counts_the_same_where_the_teacher_says_nothing(kd_ratio: float) -> None:
    """As between two tokenizers, of which some tokens meet no other."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden_TH, weight_VH = normal(T, H).requires_grad_(), normal(V, H)
    targets_T = torch.randint(V, (T,), generator=generator)
    advantage_T = normal(T)
    log_q_TV = torch.log_softmax(hidden_TH @ weight_VH.T, -1)
    chosen_T = log_q_TV[torch.arange(T), targets_T]
    sampled_T = chosen_T.detach()
    taught = torch.arange(0, T, 3)
    log_p_KV = torch.log_softmax(normal(len(taught), H) @ weight_VH.T, -1)
    teacher_KH = torch.linalg.lstsq(weight_VH, log_p_KV.T).solution.T
    log_p_KV = torch.log_softmax(teacher_KH @ weight_VH.T, -1)
    reverse_K = (log_q_TV[taught].exp() * (log_q_TV[taught] - log_p_KV)).sum(-1)
    surrogate_T = (chosen_T - sampled_T).exp() * advantage_T
    expected = kd_ratio * reverse_K.sum() - (1 - kd_ratio) * chosen_T.sum()
    (wanted_TH,) = torch.autograd.grad(expected - WEIGHT * surrogate_T.sum(), hidden_TH)

    nothing = torch.zeros(0, dtype=torch.long)
    head = OutputHead(weight_VH=weight_VH)
    rest = torch.tensor([t for t in range(T) if t % 3])
    batch = MicroBatch(
        student=TokenBatch(ids_BT=nothing, row_N=nothing, position_N=nothing),
        target_ids_N=targets_T,
        weight=1.0,
        signals=(),
        teacher_tokens=None,
        sampled_log_prob_N=sampled_T,
        advantage_N=advantage_T,
    )
    output = taught_loss(
        Student(model=None, hidden_NH=hidden_TH, head=head),  # type: ignore[arg-type]
        batch,
        taught=TokenSignal(index_K=taught, rest_R=rest, signal=HiddenSignal(teacher_KH, head)),
        spec=LossSpec(
            divergence=ReverseKL(),
            kd_ratio=kd_ratio,
            logits_bytes=10**6,
            policy_gradient=PolicyGradient(weight=WEIGHT, clip_low=LOW, clip_high=HIGH),
        ),
    )
    (found_TH,) = torch.autograd.grad(output.loss, hidden_TH)
    torch.testing.assert_close(found_TH, wanted_TH, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.terms["loss"].sum(), output.loss.detach())


@pytest.mark.parametrize("kd_ratio", [1.0, 0.6])
def test_the_clipped_surrogate(kd_ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden_TH, weight_VH, teacher_TH = normal(T, H), normal(V, H), normal(T, H)
    targets_T = torch.randint(V, (T,), generator=generator)
    weights_T = torch.rand(T, dtype=torch.float64, generator=generator)
    log_q_TV = torch.log_softmax(hidden_TH @ weight_VH.T, -1)
    own_T = log_q_TV[torch.arange(T), targets_T]
    sampled_T = own_T + 0.5 * normal(T)  # ratios on both sides of the clip
    advantage_T = normal(T)
    advantage_T[:10] = 0.0  # tokens that were not sampled
    sampled_T[:10] = float("inf")  # what they carry must not matter

    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    log_q_TV = torch.log_softmax(hidden_TH @ weight_VH.T, -1)
    log_p_TV = torch.log_softmax(teacher_TH @ weight_VH.detach().T, -1)
    chosen_T = log_q_TV[torch.arange(T), targets_T]
    ratio_T = (chosen_T - sampled_T)[10:].exp()
    surrogate_T = torch.minimum(
        ratio_T * advantage_T[10:], ratio_T.clamp(1 - LOW, 1 + HIGH) * advantage_T[10:]
    )
    reverse_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    expected = (weights_T * (kd_ratio * reverse_T - (1 - kd_ratio) * chosen_T)).sum()
    expected = expected - WEIGHT * (weights_T[10:] * surrogate_T).sum()
    wanted = torch.autograd.grad(expected, [hidden_TH, weight_VH])

    output = distillation_loss(
        student_hidden_TH=hidden_TH,
        student_head=OutputHead(weight_VH=weight_VH),
        teacher=HiddenSignal(teacher_TH, OutputHead(weight_VH=weight_VH.detach())),
        target_ids_T=targets_T,
        weights_T=weights_T,
        sampled_log_prob_T=sampled_T,
        advantage_T=advantage_T,
        spec=LossSpec(
            divergence=ReverseKL(),
            kd_ratio=kd_ratio,
            logits_bytes=3 * 2 * V * 8,
            policy_gradient=PolicyGradient(weight=WEIGHT, clip_low=LOW, clip_high=HIGH),
        ),
    )
    found = torch.autograd.grad(output.loss, [hidden_TH, weight_VH])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    beyond = (ratio_T > 1 + HIGH) | (ratio_T < 1 - LOW)
    assert 0 < int(beyond.sum()) < len(ratio_T)
