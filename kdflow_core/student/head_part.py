"""The student's output head spread over the ranks by vocabulary.

Instead of gathering the head on every rank, the ranks bring their states together, and each makes
the logits of its own tokens: less memory, and less to send where the head is larger than the states
of a step. The rows are those that FSDP would give a rank.

Dimensions: V vocabulary (of this rank's part), H hidden size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.losses.vocabulary import ShardedVocabulary
from kdflow_core.models.families import family_of


@dataclass(frozen=True, kw_only=True)
class HeadPart:
    """Which tokens a rank has: `size` of them, those from `vocabulary.first` on."""

    vocabulary: ShardedVocabulary
    size: int
    mesh: DeviceMesh
    dtype: torch.dtype


def part_of(
    model: PreTrainedModel, *, vocabulary_size: int, mesh: DeviceMesh, compute_dtype: torch.dtype
) -> HeadPart:
    """This rank's part. Raises ModelError for a head that cannot be spread."""
    linear = model.get_output_embeddings()
    if linear.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"student.vocabulary_parallel: the output head of {type(model).__name__} is its "
            "embedding (tie_word_embeddings), which every rank needs whole; turn it off"
        )
    rows = math.ceil(len(linear.weight) / mesh.size())
    first = mesh.get_local_rank() * rows
    if (mesh.size() - 1) * rows >= vocabulary_size:
        raise ModelError(
            f"student.vocabulary_parallel: {vocabulary_size} tokens in parts of {rows} leave one "
            f"of {mesh.size()} ranks without any; turn it off"
        )
    return HeadPart(
        vocabulary=ShardedVocabulary(first=first, whole=vocabulary_size, group=mesh.get_group()),
        size=min(rows, vocabulary_size - first),
        mesh=mesh,
        dtype=compute_dtype,
    )


def spread_head_(model: PreTrainedModel, mesh: DeviceMesh) -> set[torch.nn.Parameter]:
    """Leave each rank its rows of the head, as a parameter that is a DTensor; these parameters."""
    linear = model.get_output_embeddings()
    for name, parameter in list(linear.named_parameters()):
        spread = distribute_tensor(parameter.detach().to(mesh.device_type), mesh, [Shard(0)])
        setattr(linear, name, torch.nn.Parameter(spread, parameter.requires_grad))
    return set(linear.parameters())


def teacher_part(head: OutputHead, part: HeadPart) -> OutputHead:
    """The teacher's head over this rank's tokens, in memory of its own."""
    rows = slice(part.vocabulary.first, part.vocabulary.first + part.size)
    bias_V = None if head.bias_V is None else head.bias_V[rows].clone()
    return replace(head, weight_VH=head.weight_VH[rows].clone(), bias_V=bias_V)


def student_part(model: PreTrainedModel, part: HeadPart) -> OutputHead:
    """The student's head over this rank's tokens, differentiable."""
    linear = model.get_output_embeddings()
    scale, softcap = family_of(model.config).scale_and_softcap(model.config)
    bias = getattr(linear, "bias", None)
    return OutputHead(
        weight_VH=_local(linear.weight, part),
        bias_V=None if bias is None else _local(bias, part),
        logit_scale=scale,
        softcap=softcap,
    )


def _local(parameter: torch.Tensor, part: HeadPart) -> torch.Tensor:
    """This rank's rows in the dtype of computation.

    Their gradient has all ranks' tokens. FSDP averages gradients over the ranks, and the weights
    of the tokens allow for that; so this one is divided by their number.
    """
    assert isinstance(parameter, DTensor)
    rows = parameter.to_local()[: part.size].to(part.dtype)
    ranks = part.mesh.size()
    if rows.requires_grad:
        rows.register_hook(lambda gradient: gradient / ranks)  # type: ignore[no-untyped-call]
    return rows
