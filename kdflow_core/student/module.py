"""The student and its loss as one module, sharded by FSDP2.

The loss is computed inside the root's forward, where FSDP has gathered the root's parameters, so
head and embedding (tied or not) get exact, reduced gradients from the chunked loss.

Dimensions: H hidden size, N supervised tokens of the micro-batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from kdflow_core.algorithms.base import Algorithm, MicroBatch, Student
from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.losses.chunked import LossOutput
from kdflow_core.metrics import BALANCE_TERM
from kdflow_core.models.families.base import BUFFERS_OF_STATES
from kdflow_core.models.heads import live_head
from kdflow_core.models.routing import Routing, routers
from kdflow_core.models.structure import decoder_layers
from kdflow_core.student.head_part import HeadPart, spread_head_, student_part, teacher_part


class DistillationModule(torch.nn.Module):
    """A causal language model whose forward returns the algorithm's loss.

    With a `head_part`, the output head is spread over the ranks by vocabulary. A `packed` one reads
    the sequences of a micro-batch behind one another, without padding. With a `routing`, how even
    that is has its weight in the loss. With a `product_dtype`, products are of that one, and what
    is summed from layer to layer is float32, as autocast has it.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        algorithm: Algorithm,
        vocabulary_size: int,
        head_part: HeadPart | None = None,
        packed: bool = False,
        routing: Routing | None = None,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.algorithm = algorithm
        self.head_part = head_part
        self.packed = packed
        self.routing = routing
        self.product_dtype = product_dtype
        self.vocabulary_size = vocabulary_size

    def begin_micro_batch(self, *, reduces: bool, last: bool) -> None:
        """Before the forward pass of a micro-batch, the `last` of a step or not: whether its
        backward pass `reduces` gradients over the ranks, or keeps them, whole, for the next one.
        """
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(reduces)
            # What the root holds, head and embedding, is gathered once for all micro-batches.
            self.set_reshard_after_backward(last, recurse=False)

    def release(self) -> None:
        """Let go of the gathered root, which without a backward pass stays, in the dtype of the
        computation.
        """
        if isinstance(self, FSDPModule):
            self.reshard()

    def part_of_head(self, head: OutputHead) -> OutputHead:
        """A teacher's head over the tokens that this rank makes logits for."""
        return head if self.head_part is None else teacher_part(head, self.head_part)

    def forward(self, batch: MicroBatch, algorithm: Algorithm | None = None) -> LossOutput:
        """The weighted loss of a micro-batch and its per-token terms, by another algorithm than the
        module's own where one is given: to measure.
        """
        if self.routing is None or algorithm is not None:
            with self._products(batch):
                hidden_NH = batch.student.states_of(self.model)
            return self._loss(hidden_NH, batch, algorithm or self.algorithm)
        with self._products(batch):
            hidden_NH, even = batch.student.balanced_states_of(self.model, self.routing)
        output = self._loss(hidden_NH, batch, self.algorithm)
        return _balanced(output, even, self.routing.weight, batch)

    def _products(self, batch: MicroBatch) -> AbstractContextManager[object]:
        """Within, products take the module's own dtype for them."""
        if self.product_dtype is None:
            return nullcontext()
        return torch.autocast(batch.student.ids_BT.device.type, self.product_dtype)

    def _loss(self, hidden_NH: torch.Tensor, batch: MicroBatch, algorithm: Algorithm) -> LossOutput:
        if self.product_dtype is not None:
            hidden_NH = hidden_NH.to(self.product_dtype)  # as the head's own product would
        if self.head_part is None:
            head = live_head(self.model, self.vocabulary_size)
            if self.product_dtype is not None:
                head = replace(head, weight_VH=head.weight_VH.to(self.product_dtype))
        else:
            head = student_part(self.model, self.head_part)
        student = Student(model=self.model, hidden_NH=hidden_NH, head=head)
        return algorithm.loss(student, batch)


def _balanced(
    output: LossOutput, even: torch.Tensor, weight: float, batch: MicroBatch
) -> LossOutput:
    """A loss with that of the routing: as if every supervised token of the micro-batch had it."""
    count = len(batch.target_ids_N)
    terms = output.terms | {
        "loss": output.terms["loss"] + weight * even.detach(),
        BALANCE_TERM.name: even.detach().expand(count),
    }
    return LossOutput(output.loss + batch.weight * count * weight * even, terms)


def student_mesh(device: torch.device, *, replicas: int) -> DeviceMesh:
    """All ranks: one dimension that the student is sharded over, or behind one of `replicas`."""
    ranks = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=names)


def shard(
    module: DistillationModule,
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    offload: bool = False,
) -> None:
    """Shard each decoder layer, then the rest. Parameters stay float32; layers compute in
    `compute_dtype` (float32 where the module has a `product_dtype`, which autocast sees to);
    gradients are reduced in float32. One rank that computes in float32 has nothing to gather or to
    cast, and stays as it is. With `offload`, parameters and gradients are in host memory but for
    the layer that computes. Raises ModelError.
    """
    if module.product_dtype is not None:
        compute_dtype = torch.float32
        _spare_routers(module.model)
    if mesh.device_type == "cpu":
        _spare_embedding_gradient(module.model)
    alone = mesh.size() == 1 and module.head_part is None
    if alone and compute_dtype == torch.float32 and not offload:
        module.to(mesh.device_type)
        return
    param_dtype = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for model in (module.model, *module.algorithm.models):
        if param_dtype is not None:
            _cast_buffers(model, param_dtype)
            _shard_routers(model, mesh, param_dtype, place)
        for layer in decoder_layers(model):
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=reshard_after_forward,
                offload_policy=place,
            )
    # The root's inputs are token ids, loss weights and teacher states: not to be cast.
    root_policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    spread = set() if module.head_part is None else spread_head_(module.model, mesh)
    fully_shard(
        module, mesh=mesh, mp_policy=root_policy, ignored_params=spread, offload_policy=place
    )
    if not isinstance(module, FSDPModule):
        raise ModelError("FSDP2 did not take the student module")


def _spare_routers(model: PreTrainedModel) -> None:
    """Leave the routers among experts out of autocast: they choose in float32."""
    for router in routers(model):
        own = router.forward

        def forward(*args: Any, own: Callable[..., Any] = own, **named: Any) -> Any:
            with torch.autocast(args[0].device.type, enabled=False):
                return own(*args, **named)

        router.forward = forward


def _cast_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """FSDP casts what trains, and leaves buffers as they are."""
    for buffer_name, buffer in model.named_buffers():
        owner, _, name = buffer_name.rpartition(".")
        if name in BUFFERS_OF_STATES:
            setattr(model.get_submodule(owner), name, buffer.to(dtype))


def _shard_routers(
    model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype, place: OffloadPolicy
) -> None:
    """Have the routers among experts choose in float32, whatever the layers around them compute
    in: Switch Transformer, arXiv 2101.03961, section 2.4.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=dtype
    )
    for router in routers(model):
        # Small, and so kept until the backward pass.
        fully_shard(
            router,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=False,
            offload_policy=place,
        )


def _spare_embedding_gradient(model: PreTrainedModel) -> None:
    """Let an embedding that is tied to the head have the gradient of a batch's tokens alone: it is
    added to the head's, which is dense. On a CPU a second dense one costs some percent of a step.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and embedding.weight is output.weight:
        embedding.sparse = True
