"""The policy gradient of a sampled token: against PPO's surrogate, and in expectation.

`sampled_reverse_kl` is not a function of both distributions alone, as the other divergences are.
"""

import pytest
import torch

from configs.schema.loss import SampledReverseKLConfig
from kdflow_core.losses import LOSSES, build_divergence
from kdflow_core.losses.base import Distributions
from kdflow_core.losses.vocabulary import WholeVocabulary

TOKENS, VOCABULARY = 40, 11


def random_logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1]


def distributions(
    logits_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    ids_T: torch.Tensor,
    sampled_T: torch.Tensor | None,
) -> Distributions:
    log_q_TV = torch.log_softmax(logits_TV.detach(), -1)
    log_p_TV = torch.log_softmax(teacher_TV, -1)
    over = WholeVocabulary()
    return Distributions(log_q_TV, log_q_TV.exp(), log_p_TV, log_p_TV.exp(), over, ids_T, sampled_T)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 3.0)])
def test_gradient_is_that_of_ppos_clipped_surrogate(low: float, high: float) -> None:
    logits_TV, teacher_TV = random_logits(0)
    generator = torch.Generator().manual_seed(1)
    ids_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    shift_T = torch.randn(TOKENS, generator=generator, dtype=torch.float64) * 0.5
    rows = torch.arange(TOKENS)
    log_q_T = torch.log_softmax(logits_TV, -1)[rows, ids_T]
    sampled_T = log_q_T.detach() + shift_T  # an older policy: ratios on both sides of the clip
    ratio_T = (log_q_T - sampled_T).exp()
    advantage_T = (torch.log_softmax(teacher_TV, -1)[rows, ids_T] - log_q_T).detach()
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    surrogate_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    surrogate_T.sum().backward()
    divergence = build_divergence(SampledReverseKLConfig(clip_low=low, clip_high=high))
    value_T, gradient_TV = divergence.value_and_gradient(
        distributions(logits_TV, teacher_TV, ids_T, sampled_T)
    )
    torch.testing.assert_close(gradient_TV, logits_TV.grad)
    torch.testing.assert_close(value_T, (-ratio_T * advantage_T).detach())
    assert (gradient_TV.abs().sum(-1) == 0).any()  # some tokens are clipped
    assert (gradient_TV.abs().sum(-1) > 0).any()


def test_in_expectation_it_is_the_reverse_kl_over_the_vocabulary() -> None:
    """Over all tokens that the student could have sampled, each by its probability."""
    logits_TV, teacher_TV = random_logits(2)
    q_TV, log_p_TV = torch.softmax(logits_TV, -1), torch.log_softmax(teacher_TV, -1)
    kl_T = (q_TV * (q_TV.log() - log_p_TV)).sum(-1)
    kl_T.sum().backward()
    value_T, gradient_TV = torch.zeros(TOKENS, dtype=torch.float64), torch.zeros_like(teacher_TV)
    for token in range(VOCABULARY):
        ids_T = torch.full((TOKENS,), token)
        chance_T = q_TV.detach()[:, token]
        d = distributions(logits_TV, teacher_TV, ids_T, chance_T.log())
        value, gradient = LOSSES["sampled_reverse_kl"]().value_and_gradient(d)
        value_T += chance_T * value
        gradient_TV += chance_T.unsqueeze(-1) * gradient
    torch.testing.assert_close(gradient_TV, logits_TV.grad)
    torch.testing.assert_close(value_T, kl_T.detach())


def test_tokens_that_were_not_sampled_are_refused() -> None:
    logits_TV, teacher_TV = random_logits(3)
    ids_T = torch.zeros(TOKENS, dtype=torch.long)
    with pytest.raises(ValueError, match="needs the log-probabilities of sampled tokens"):
        LOSSES["sampled_reverse_kl"]().value_and_gradient(
            distributions(logits_TV, teacher_TV, ids_T, None)
        )
