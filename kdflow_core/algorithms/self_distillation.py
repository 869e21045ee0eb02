"""The student as its own teacher: as it is now, or as an average of what it has been.

`synchronized`: the teacher has the student's weights of the moment. With equal contexts it would
teach nothing; it is for a teacher template that tells the teacher more than the student sees
(context distillation, Snell et al., arXiv 2209.15189). `ema`: the teacher's weights follow as
w <- decay * w + (1 - decay) * w_student after each step (Mean Teacher, arXiv 1703.01780, equation
1). A frozen copy is an ordinary teacher: `vanilla_kd` with the same model on both sides.
Dimensions: N supervised tokens.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from transformers import PreTrainedModel

from configs.schema.algorithm import SelfDistillationConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    whole_batch_loss,
)
from kdflow_core.contracts import HiddenSignal
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.models.heads import live_head
from kdflow_core.models.partial_loading import own_part


class SelfDistillation(Algorithm):
    """The teacher's states are computed beside the student's, from the teacher's tokens."""

    reads_teacher_tokens: ClassVar[bool] = True

    def __init__(self, config: SelfDistillationConfig, ingredients: Ingredients) -> None:
        super().__init__()
        self._spec = ingredients.spec
        self._vocabulary_size = ingredients.vocabulary_size
        self._decay = config.decay
        self.average: PreTrainedModel | None = None
        if config.update == "ema":
            self.average = copy.deepcopy(ingredients.model).requires_grad_(requires_grad=False)

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """See `Algorithm`."""
        return () if self.average is None else (self.average,)

    def train(self, mode: bool = True) -> Self:
        """The average stays in evaluation mode: a teacher drops nothing out."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`."""
        teacher = student.model if self.average is None else self.average
        with torch.no_grad():
            teacher_NH = self._states(teacher, batch)
            teacher_head = live_head(teacher, self._vocabulary_size)
        own = HiddenSignal(teacher_NH, teacher_head)
        return whole_batch_loss(student, batch, teacher=own, spec=self._spec)

    def _states(self, teacher: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
        assert batch.teacher_tokens is not None
        training = teacher.training
        teacher.eval()
        states_NH = batch.teacher_tokens.states_of(teacher)
        teacher.train(training)
        return states_NH

    @torch.no_grad()
    def after_step(self, model: PreTrainedModel) -> None:
        """See `Algorithm`."""
        if self.average is None:
            return
        for mine, new in zip(self.average.parameters(), model.parameters(), strict=True):
            own_part(mine).lerp_(own_part(new).to(mine.dtype), 1 - self._decay)
