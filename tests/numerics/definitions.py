"""The divergences as the papers write them, over float64 probabilities, for autograd.

No formula here is shared with the code under test. Dimensions: T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

from kdflow_core.losses.base import Distributions, Divergence
from kdflow_core.losses.vocabulary import WholeVocabulary

Definition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kl(a_TV: torch.Tensor, b_TV: torch.Tensor) -> torch.Tensor:
    return (a_TV * (a_TV / b_TV).log()).sum(-1)


def generalized_jsd(beta: float) -> Definition:
    def value(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        if beta in {0, 1}:
            return kl(p, q) if beta == 0 else kl(q, p)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def adaptive_kl(head_mass: float) -> Definition:
    def value(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        rows = []
        for p_V, q_V in zip(p, q, strict=True):
            head, mass = [], 0.0
            for v in sorted(range(len(p_V)), key=lambda v: -p_V[v].item()):
                if mass >= head_mass:
                    break
                head.append(v)
                mass += p_V[v].item()
            gaps = (p_V - q_V).abs().detach()
            share = gaps[head].sum() / gaps.sum()
            rows.append(share * kl(p_V, q_V) + (1 - share) * kl(q_V, p_V))
        return torch.stack(rows)

    return value


def alpha_beta(a: float, b: float) -> Definition:
    def value(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        inside = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -inside.sum(-1) / (a * b)

    return value


def hierarchical_ranking(k: int) -> Definition:
    def value(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        rows = []
        for p_V, q_V in zip(p, q, strict=True):
            order = sorted(range(len(p_V)), key=lambda v: -p_V[v].item())[:k]
            liked = sorted(range(len(q_V)), key=lambda v: -q_V[v].item())[:k]
            zero = torch.zeros((), dtype=q.dtype)
            total = sum(torch.maximum(zero, q_V[j] - q_V[order[0]]) for j in order)
            for i in order:
                for j in liked:
                    if p_V[i] > p_V[j]:
                        total = total + torch.maximum(zero, q_V[j] - q_V[i])
            rows.append(total)
        return torch.stack(rows)

    return value


def top1(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    best = p.argmax(-1, keepdim=True)
    return -(p.gather(-1, best) * q.gather(-1, best).log()).squeeze(-1)


# Each divergence in settings that differ in kind: its `type`, its fields, its definition of (p, q).
# `sampled_reverse_kl` is no function of these two; it has tests of its own.
CASES: list[tuple[str, dict[str, Any], Definition]] = [
    ("forward_kl", {}, kl),
    ("reverse_kl", {}, lambda p, q: kl(q, p)),
    *(
        ("generalized_jsd", {"beta": beta}, generalized_jsd(beta))
        for beta in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)
    ),
    ("skewed_kl", {"alpha": 0.1}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    ("skewed_kl", {"alpha": 0.7}, lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
    ("skewed_reverse_kl", {"alpha": 0.1}, lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    ("skewed_reverse_kl", {"alpha": 0.7}, lambda p, q: kl(q, 0.3 * p + 0.7 * q)),
    ("adaptive_kl", {}, adaptive_kl(0.5)),
    ("adaptive_kl", {"head_mass": 0.9}, adaptive_kl(0.9)),
    ("total_variation", {}, lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    ("top1_cross_entropy", {}, top1),
    ("alpha_beta", {}, alpha_beta(0.2, 0.7)),
    ("alpha_beta", {"alpha": 1.5, "beta": 0.5}, alpha_beta(1.5, 0.5)),
    ("alpha_divergence", {}, lambda p, q: 4 * (1 - (p.sqrt() * q.sqrt()).sum(-1))),
    (
        "alpha_divergence",
        {"alpha": 0.8},
        lambda p, q: (1 - (p**0.8 * q**0.2).sum(-1)) / (0.8 * 0.2),
    ),
    ("hierarchical_ranking", {}, hierarchical_ranking(5)),
    ("hierarchical_ranking", {"top_k": 2}, hierarchical_ranking(2)),
]
NAMES = [f"{name}-{'-'.join(map(str, fields.values()))}".rstrip("-") for name, fields, _ in CASES]


def evaluate(
    divergence: Divergence, log_q_TV: torch.Tensor, log_p_TV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A divergence's value and gradient, of log-probabilities."""
    targets_T = torch.zeros(len(log_q_TV), dtype=torch.long)
    d = Distributions(
        log_q_TV, log_q_TV.exp(), log_p_TV, log_p_TV.exp(), WholeVocabulary(), targets_T, None
    )
    return divergence.value_and_gradient(d)
