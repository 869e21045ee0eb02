"""The student and its loss as one module, sharded by FSDP2.

The loss is computed inside the root's forward, where FSDP has gathered the root's parameters, so
head and embedding (tied or not) get exact, reduced gradients from the chunked loss.

Dimensions: B sequences, T tokens, H hidden size, N supervised tokens of the micro-batch, G hidden
size of the teacher.
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.losses.chunked import LossOutput, LossSpec, distillation_loss
from kdflow_core.models.heads import live_head


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Padded ids [B, T]; for each supervised token the row and position of the state that predicts
    it, its id, and the teacher's state; and the weight of every supervised token in the loss.
    """

    ids_BT: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    target_ids_N: torch.Tensor
    teacher_hidden_NG: torch.Tensor
    weight: float


class DistillationModule(torch.nn.Module):
    """A causal language model whose forward returns the distillation loss."""

    def __init__(self, *, model: PreTrainedModel, teacher_head: OutputHead, spec: LossSpec) -> None:
        super().__init__()
        self.model = model
        self._teacher_head = teacher_head
        self._spec = spec

    def forward(self, batch: MicroBatch) -> LossOutput:
        """The weighted loss of a micro-batch and its per-token terms."""
        hidden_BTH = self.model.base_model(
            input_ids=batch.ids_BT, use_cache=False
        ).last_hidden_state
        hidden_NH = hidden_BTH[batch.row_N, batch.position_N]
        return distillation_loss(
            student_hidden_TH=hidden_NH,
            student_head=live_head(self.model, self._teacher_head.weight_VH.shape[0]),
            teacher_hidden_TG=batch.teacher_hidden_NG,
            teacher_head=self._teacher_head,
            target_ids_T=batch.target_ids_N,
            weights_T=torch.full_like(batch.target_ids_N, batch.weight, dtype=torch.float32),
            spec=self._spec,
        )


def shard(module: DistillationModule, *, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard each decoder layer, then the rest. Parameters stay float32; layers compute in
    `compute_dtype`; gradients are reduced in float32. Raises ModelError.
    """
    layers = getattr(module.model.base_model, "layers", None)
    if layers is None:
        layers = getattr(module.model.base_model, "h", None)  # GPT-2
    if layers is None:
        raise ModelError(f"{type(module.model).__name__} has no list of decoder layers to shard")
    param_dtype = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root's inputs are token ids, loss weights and teacher states: not to be cast.
    root_policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(module, mesh=mesh, mp_policy=root_policy)
    if not isinstance(module, FSDPModule):
        raise ModelError("FSDP2 did not take the student module")
