"""What a divergence is.

Notation: p teacher, q student, z the student's logits at temperature 1.
Dimensions: T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from kdflow_core.losses.vocabulary import Vocabulary


class Distributions(NamedTuple):
    """What a divergence sees of some tokens: both models' probabilities and their logarithms, at
    its temperature, all [T, V] and not to be written to; and what sums over the vocabulary.

    `target_ids_T` are the tokens that stand in the data, and `sampled_log_prob_T` are the
    log-probabilities that they had when they were sampled, if they were. `log_mass_T2` are
    the logarithms of what the student's and the teacher's distributions count (None: 1 each), for
    the divergences that say that they read it.
    """

    log_q_TV: torch.Tensor
    q_TV: torch.Tensor
    log_p_TV: torch.Tensor
    p_TV: torch.Tensor
    over: Vocabulary
    target_ids_T: torch.Tensor
    sampled_log_prob_T: torch.Tensor | None
    log_mass_T2: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Divergence(ABC):
    """A per-token divergence with its own logit gradient.

    `temperature` divides both models' logits before a divergence sees them;
    `scale_by_temperature_squared` multiplies the result by its square. One that
    `needs_whole_vocabulary` (it sorts, say) cannot run over a vocabulary spread over ranks; one
    that `needs_samples` reads `sampled_log_prob_T`.
    """

    temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    needs_whole_vocabulary: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False

    @abstractmethod
    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token [T], and their gradient [T, V] for the *tempered* student logits: a new
        tensor, which the caller may write to.
        """


def softmax_gradient(u_TV: torch.Tensor, d: Distributions) -> torch.Tensor:
    """The gradient for the student's logits of a sum over the vocabulary of l_v(q_v), from
    u_v = q_v dl_v/dq_v: the softmax's Jacobian takes it to u - q sum_v u_v.
    """
    return torch.addcmul(u_TV, d.q_TV, d.over.sum(u_TV).unsqueeze(-1), value=-1)


def log_mixture(teacher_part: float, d: Distributions) -> torch.Tensor:
    """log(teacher_part p + (1 - teacher_part) q), [T, V]; parts in (0, 1).

    A mixture that underflows is taken as the smallest number: what it is compared with has no mass
    there either. Three times as fast as `logaddexp`.
    """
    mixture_TV = torch.add(d.p_TV * teacher_part, d.q_TV, alpha=1 - teacher_part)
    return mixture_TV.clamp_(min=torch.finfo(mixture_TV.dtype).tiny).log_()
