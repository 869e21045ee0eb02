"""Supervised fine-tuning: cross-entropy on the data's tokens, no teacher.

The baseline; and on answers that the teacher wrote (`data.answers`), sequence-level distillation of
Kim and Rush, arXiv 1606.07947, section 3.2.
"""

from dataclasses import replace

from configs.schema.algorithm import SFTConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    whole_batch_loss,
)
from kdflow_core.losses.chunked import LossOutput


class SFT(Algorithm):
    """Cross-entropy alone."""

    def __init__(self, config: SFTConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = replace(ingredients.spec, divergence=None, kd_ratio=0.0, token_weight=None)

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        return whole_batch_loss(student, batch, teacher=None, spec=self._spec)
