"""Top-1 cross-entropy, -p(v*) log q(v*) at the teacher's most probable token v*.

Learning from the teacher's choice, as sequence-level distillation does (Kim and Rush, arXiv
1606.07947, section 3.2), token by token and weighed by its confidence. Not a divergence: it is not
zero for equal distributions. Of several most probable tokens the first counts.
Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence


@dataclass(frozen=True, kw_only=True)
class Top1CrossEntropy(Divergence):
    """Cross-entropy of the teacher's top-1 token, times its probability; nats per token."""

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        top_T = d.over.top1(d.p_TV)
        p_T = d.over.at(d.p_TV, top_T)
        gradient_TV = d.q_TV * p_T.unsqueeze(-1)
        d.over.add_at_(gradient_TV, top_T, -p_T)
        return -p_T * d.over.at(d.log_q_TV, top_T), gradient_TV
