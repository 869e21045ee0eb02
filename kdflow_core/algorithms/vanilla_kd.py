"""Distillation of one teacher: cross-entropy and a divergence at every supervised token.

Hinton et al., arXiv 1503.02531; with `reverse_kl` or `generalized_jsd` on answers of the student's
own, one round of GKD, arXiv 2306.13649, algorithm 1.
"""

from collections.abc import Sequence

from configs.schema.algorithm import VanillaKDConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    Teacher,
    partly_taught_loss,
    whole_batch_loss,
)
from kdflow_core.losses.chunked import LossOutput


class VanillaKD(Algorithm):
    """One teacher, all tokens that it says something about; the others have cross-entropy alone."""

    def __init__(self, config: VanillaKDConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = ingredients.spec
        self._teacher = Teacher(head=ingredients.heads["teacher"])

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return (self._teacher,)

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        (taught,) = batch.signals
        if len(taught.index_K) == len(batch.target_ids_N):
            return whole_batch_loss(student, batch, teacher=taught.signal, spec=self._spec)
        return partly_taught_loss(student, batch, taught=taught, spec=self._spec)
