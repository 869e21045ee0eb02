"""Large models over ranks, of which none reads, or holds, more than its own part.

First comes the model without values: its tensors are allocated and never written, which takes
addresses and no memory. Once it is sharded, every rank reads its rows from the files.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from kdflow_core.models.checkpoints import TensorHeader, read_checkpoint
from kdflow_core.models.loading import checked_folder
from kdflow_core.models.saving import saved_buffers
from kdflow_core.models.tokenizers import LIBRARY_ERRORS


def unfilled_causal_lm(
    folder: Path, *, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """A folder's model in evaluation mode, on the CPU, its weights without values, its buffers with
    theirs; `fill_own_part_` gives the values. None where weights must be converted when they are
    read, or are not wholly and exactly the model's: then `load_causal_lm` reads them, or says what
    is wrong. Raises ModelError.
    """
    config, tensors = checked_folder(folder, attention, trust_remote_code=trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
        model.tie_weights()
        if get_model_conversion_mapping(model, add_legacy=False):
            return None
    except LIBRARY_ERRORS:
        return None
    if any(p.device.type != "meta" for p in model.parameters()) or not _same(model, tensors):
        return None
    _allocate_(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


def fill_own_part_(model: PreTrainedModel, folder: Path) -> None:
    """Read what a rank has of the weights of an `unfilled_causal_lm`, from the same folder.

    Tensors that are sharded are so by rows over the last dimension of ranks. Adapters keep their
    values.
    """
    tensors = read_checkpoint(folder).tensors
    own = {_saved_name(name): tensor for name, tensor in _stateful(model).items()}
    by_file: dict[Path, list[str]] = {}
    for name in own.keys() & tensors.keys():
        by_file.setdefault(tensors[name].path, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                _fill_(own[name], file, name, tensors[name].shape)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor that may be sharded (a view)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _fill_(tensor: torch.Tensor, file: Any, name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(file.get_tensor(name))
        return
    *others, last = tensor.placements
    if last != Shard(0) or not all(placement.is_replicate() for placement in others):
        raise ValueError(f"sharded as {tensor.placements}; known is one dimension of rows")
    mesh, local = tensor.device_mesh, tensor.to_local()
    dimension = mesh.ndim - 1
    # As `torch.chunk` has it: the last ranks may have fewer rows, or none.
    first = mesh.get_local_rank(dimension) * -(-shape[0] // mesh.size(dimension))
    if len(local):
        local.copy_(file.get_slice(name)[first : first + len(local)])


def _saved_name(name: str) -> str:
    """The name of a weight in the files, where an adapter is on its layer."""
    return name.replace(".base_layer.", ".")


def _stateful(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: parameters, a tied one once, and buffers that are saved."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    return named | saved_buffers(model)


def _same(model: PreTrainedModel, tensors: dict[str, TensorHeader]) -> bool:
    """Whether files hold all that the model has, under its names, and nothing else."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = _stateful(model).keys()
    return (
        needed <= tensors.keys() <= shapes.keys()
        and all(tensors[name].shape == shapes[name] for name in tensors)
        and not any(tensors[name].dtype not in FLOATS for name in needed)
    )


# As safetensors names them. What is quantized is for its own reader.
FLOATS = ("F64", "F32", "F16", "BF16")


def _allocate_(model: PreTrainedModel) -> None:
    """Tensors in place of those on `meta`, tied ones tied. The allocator gives addresses, and the
    system memory once something is written.
    """
    allocated: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in allocated:
                empty = torch.empty_like(parameter, device="cpu")
                allocated[parameter] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = allocated[parameter]
