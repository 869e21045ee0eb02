"""Several teachers: each for its data sources, or all of them by weight.

By weight, the loss is sum_k weight_k * ((1 - kd_ratio) CE + kd_ratio D(p_k, q)), the weights
adding up to 1: the average of the teachers' losses, as You et al., KDD 2017 ("Learning from
Multiple Teacher Networks"), section 3.1, average their soft targets; for forward KL the gradient is
that of the averaged distribution. Each teacher's pass makes the student's logits anew. Teachers
with tokenizers of their own are compared with the student each by its alignment.
Dimensions: N supervised tokens, K those of one teacher, C those that any teacher is compared at.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema.algorithm import MultiTeacherConfig
from kdflow_core.algorithms.base import (
    Algorithm,
    Ingredients,
    MicroBatch,
    Student,
    Teacher,
    taught_loss,
)
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.metrics import TAUGHT_TERMS


class MultiTeacher(Algorithm):
    """The sum of the teachers' losses, each over its tokens."""

    def __init__(self, config: MultiTeacherConfig, ingredients: Ingredients) -> None:
        super().__init__()
        total = sum(part.weight for part in config.teachers.values())
        self._teachers = tuple(
            Teacher(
                head=ingredients.heads[name],
                view=ingredients.views.get(name, "teacher"),
                weight=1.0 if part.sources is not None else part.weight / total,
                sources=None if part.sources is None else frozenset(part.sources),
            )
            for name, part in config.teachers.items()
        )
        spec = ingredients.spec
        self._specs = tuple(
            replace(spec, folding=ingredients.foldings.get(name, spec.folding))
            for name in config.teachers
        )

    @property
    def teachers(self) -> Sequence[Teacher]:
        """See `Algorithm`."""
        return self._teachers

    def loss(self, student: Student, batch: MicroBatch) -> LossOutput:
        """See `Algorithm`. A token's terms are means over the teachers by their weights, of those
        that are compared at it.
        """
        loss = student.hidden_NH.new_zeros(())
        terms: dict[str, torch.Tensor] = {}
        shares_N = torch.zeros_like(batch.weights_N)
        for teacher, spec, taught in zip(self._teachers, self._specs, batch.signals, strict=True):
            weighted = replace(batch, weight=batch.weight * teacher.weight)
            output = taught_loss(student, weighted, taught=taught, spec=spec)
            loss = loss + output.loss
            share_K = torch.full_like(taught.index_K, teacher.weight, dtype=torch.float32)
            shares_N.index_add_(0, taught.index_K, share_K)
            both = torch.cat([taught.index_K, taught.rest_R])
            for name, term in output.terms.items():
                zero_N = torch.zeros_like(shares_N, dtype=term.dtype)
                term_N = terms.setdefault(name, zero_N)
                places = taught.index_K if name in TAUGHT_TERMS else both
                term_N.index_add_(0, places, term * teacher.weight)
        compared_C = shares_N.nonzero().squeeze(-1)
        for name in TAUGHT_TERMS:
            terms[name] = terms[name][compared_C] / shares_N[compared_C]
        return LossOutput(loss, terms)
