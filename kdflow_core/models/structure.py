"""What a model is made of, by its config alone: built on PyTorch's meta device, without weights."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from configs.schema.student import ParameterGroup
from kdflow_core.errors import ModelError
from kdflow_core.models.families import BY_ARCHITECTURE, known_family
from kdflow_core.models.families.plain import PLAIN
from kdflow_core.models.tokenizers import LIBRARY_ERRORS


def meta_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without weights. Raises ModelError."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except LIBRARY_ERRORS as error:
        name = (config.architectures or ["unknown"])[0]
        raise ModelError(f"transformers cannot build {name}: {error}") from error
    return model


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a causal language model. Raises ModelError."""
    family = BY_ARCHITECTURE.get(type(model).__name__) or known_family(model.config)
    try:
        layers = model.base_model.get_submodule((family or PLAIN).layers)
    except AttributeError:
        layers = None
    if isinstance(layers, torch.nn.ModuleList):
        return layers
    raise ModelError(f"{type(model).__name__} has no list of decoder layers")


def layers_prefix(model: PreTrainedModel) -> str:
    """What stands before a layer's number in the names of its parameters."""
    layers = decoder_layers(model)
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def named_groups(names: Iterable[str], groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """The names of a student's parameters that fit each group, and no earlier one.

    Raises ModelError for a group that none is left for, and where all parameters are frozen.
    """
    left, found = list(names), []
    for group in groups:
        fitting = [name for name in left if fnmatchcase(name, group.names)]
        if not fitting:
            raise ModelError(
                f"student.parameter_groups: no parameter is named '{group.names}', or an earlier "
                f"group has it; there are {', '.join(left[:3]) or 'none left'}"
                + (", and others" if len(left) > 3 else "")
            )
        left = [name for name in left if name not in set(fitting)]
        found.append(fitting)
    if groups and not left and all(group.frozen for group in groups):
        raise ModelError("student.parameter_groups: every parameter is frozen; nothing would train")
    return found


def adapter_targets(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """The linear layers that low-rank adapters go to: those whose names end in one of `targets`, or
    all in the decoder layers.

    Raises ModelError for what an adapter would not train, or would not be merged into.
    """
    prefix = layers_prefix(model)
    linear, other = [], []
    for name, module in model.named_modules():
        if not name or (targets is not None and not _ends_in(name, targets)):
            continue
        if type(module) is torch.nn.Linear and name.startswith(prefix):
            if not _is_passed_over(model, name):
                linear.append(name)
            elif targets is not None:
                other.append(f"{name} (past which its weight is read)")
        elif targets is not None or type(module).__name__ == "Conv1D":
            other.append(f"{name} ({type(module).__name__})")
    if other:
        where = "student.lora.targets" if targets is not None else "student.lora"
        raise ModelError(
            f"{where}: adapters go to linear layers of the decoder, and not to "
            f"{', '.join(other[:3])} of {type(model).__name__}; "
            + (f"name others, such as {_examples(model)}" if linear or targets else "leave it out")
        )
    if not linear:
        raise ModelError(
            f"student.lora.targets={list(targets or ())} are no layers of {type(model).__name__}; "
            f"it has {_examples(model)}"
        )
    return linear


def _is_passed_over(model: PreTrainedModel, name: str) -> bool:
    """Whether an adapter on a linear layer would not learn: a state-space mixer hands the layer's
    weight to a fused kernel (not on a CPU, and not in all models), DeepSeek-V2 reads the one of its
    router, and the index of sparse attention has no gradient.
    """
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    is_fused = hasattr(owner, "A_log") and hasattr(owner, "D") and own != "in_proj"
    return is_fused or (own == "gate" and hasattr(owner, "experts")) or ".indexer." in name


def _ends_in(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _examples(model: PreTrainedModel) -> str:
    prefix = layers_prefix(model)
    names = {
        re.sub(r"^\d+\.", "", name.removeprefix(prefix)).rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(prefix) and type(module) is torch.nn.Linear
    }
    return ", ".join(sorted(names)) or "none"
