"""Distillation of one teacher: cross-entropy and a divergence at every supervised token.

Hinton et al., arXiv 1503.02531; with `reverse_kl` or `generalized_jsd` on answers of the student's
own, one round of GKD, arXiv 2306.13649, algorithm 1. Dimensions: N supervised tokens, H hidden
size.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from configs.schema.algorithm import VanillaKDConfig
from kdflow_core.algorithms.base import Algorithm, Ingredients, MicroBatch, TeacherHead
from kdflow_core.contracts import OutputHead
from kdflow_core.losses.chunked import LossOutput, TeacherStates, distillation_loss


class VanillaKD(Algorithm):
    """One teacher, all tokens."""

    def __init__(self, config: VanillaKDConfig, ingredients: Ingredients) -> None:
        super().__init__()
        del config
        self._spec = ingredients.spec
        self._teacher = TeacherHead(head=ingredients.heads["teacher"])

    @property
    def teachers(self) -> Sequence[TeacherHead]:
        """See `Algorithm`."""
        return (self._teacher,)

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
        (states,) = batch.teachers
        return distillation_loss(
            student_hidden_TH=hidden_NH,
            student_head=head,
            teacher=TeacherStates(states.hidden_KG, self._teacher.head),
            target_ids_T=batch.target_ids_N,
            weights_T=batch.weights_N,
            sampled_log_prob_T=batch.sampled_log_prob_N,
            spec=self._spec,
        )
