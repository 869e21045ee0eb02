"""Supervised fine-tuning: cross-entropy on the data's tokens, no teacher.

The baseline; and on answers that the teacher wrote (`data.answers`), sequence-level distillation of
Kim and Rush, arXiv 1606.07947, section 3.2. Dimensions: N supervised tokens, H hidden size.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from configs.schema.algorithm import SFTConfig
from kdflow_core.algorithms.base import Algorithm, Ingredients, MicroBatch
from kdflow_core.contracts import OutputHead
from kdflow_core.losses.chunked import LossOutput, distillation_loss


class SFT(Algorithm):
    """Cross-entropy alone."""

    def __init__(self, config: SFTConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = replace(ingredients.spec, divergence=None, kd_ratio=0.0, token_weight=None)

    def loss(
        self,
        *,
        model: PreTrainedModel,
        hidden_NH: torch.Tensor,
        head: OutputHead,
        batch: MicroBatch,
    ) -> LossOutput:
        """See `Algorithm`."""
        del model
        return distillation_loss(
            student_hidden_TH=hidden_NH,
            student_head=head,
            teacher=None,
            target_ids_T=batch.target_ids_N,
            weights_T=batch.weights_N,
            spec=self._spec,
        )
