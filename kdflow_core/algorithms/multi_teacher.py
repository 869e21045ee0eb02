"""Several teachers of one vocabulary: each for its data sources, or all of them by weight.

By weight, the loss is sum_k weight_k * ((1 - kd_ratio) CE + kd_ratio D(p_k, q)), the weights
adding up to 1: the average of the teachers' losses, as You et al., KDD 2017 ("Learning from
Multiple Teacher Networks"), section 3.1, average their soft targets; for forward KL the gradient is
that of the averaged distribution. Each teacher's pass makes the student's logits anew.
Dimensions: N supervised tokens, K those of one teacher.
"""

from collections.abc import Sequence

import torch

from configs.schema.algorithm import MultiTeacherConfig
from kdflow_core.algorithms.base import Algorithm, Ingredients, MicroBatch, Student, Teacher
from kdflow_core.contracts import HiddenSignal
from kdflow_core.losses.chunked import LossOutput, distillation_loss


class MultiTeacher(Algorithm):
    """The sum of the teachers' losses, each over its tokens."""

    def __init__(self, config: MultiTeacherConfig, ingredients: Ingredients) -> None:
        super().__init__()
        self._spec = ingredients.spec
        total = sum(part.weight for part in config.teachers.values())
        self._teachers = tuple(
            Teacher(
                head=ingredients.heads[name],
                weight=1.0 if part.sources is not None else part.weight / total,
                sources=None if part.sources is None else frozenset(part.sources),
            )
            for name, part in config.teachers.items()
        )

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return self._teachers

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`. The per-token terms are weighted sums over the teachers."""
        sampled_N = batch.sampled_log_prob_N
        loss = student.hidden_NH.new_zeros(())
        terms: dict[str, torch.Tensor] = {}
        for teacher, taught in zip(self._teachers, batch.signals, strict=True):
            chosen_K = taught.index_K
            assert isinstance(taught.signal, HiddenSignal)  # the config refuses others
            output = distillation_loss(
                student_hidden_TH=student.hidden_NH[chosen_K],
                student_head=student.head,
                teacher=taught.signal,
                target_ids_T=batch.target_ids_N[chosen_K],
                weights_T=batch.weights_N[chosen_K] * teacher.weight,
                sampled_log_prob_T=None if sampled_N is None else sampled_N[chosen_K],
                spec=self._spec,
            )
            loss = loss + output.loss
            for name, term_K in output.terms.items():
                zero_N = torch.zeros_like(batch.weights_N, dtype=term_K.dtype)
                term_N = terms.setdefault(name, zero_N)
                term_N.index_add_(0, chosen_K, term_K * teacher.weight)
        return LossOutput(loss, terms)
