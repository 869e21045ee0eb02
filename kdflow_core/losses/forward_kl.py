"""Forward KL, KL(p || q) = sum_v p (log p - log q), of Hinton et al., arXiv 1503.02531, section 2.

The paper trains on soft targets' cross-entropy, which differs by the teacher's entropy: same
gradient, q - p, and zero at equality. Dimensions: T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from kdflow_core.losses.base import Distributions, Divergence


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(teacher || student), nats per token."""

    def value_and_gradient(self, d: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        return d.over.dot(d.p_TV, d.log_p_TV - d.log_q_TV), d.q_TV - d.p_TV
