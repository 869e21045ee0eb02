"""A model with decoder layers taken out, and the config that describes what is left.

Layers need not be alike: some are dense and some have experts, some see a window and some all, and
configs say so by lists, by counts and by periods. The config is rewritten by the rules below, and
then the model that it describes is compared with the layers that are kept, one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kdflow_core.errors import ModelError
from kdflow_core.models.families.base import LAYER_FIELDS, LEADING_COUNTS
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.models.saving import save_model_folder
from kdflow_core.models.structure import (
    decoder_layers,
    layers_prefix,
    meta_model,
)
from kdflow_core.models.tokenizers import load_tokenizer

# Where each layer stands; equal in no two models.
PLACES = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})


def drop_layers(
    whole: Path, target: Path, layers: Sequence[int], *, trust_remote_code: bool = False
) -> None:
    """Write a copy of a model without the given decoder layers. Raises ModelError."""
    config = kept_config(whole, layers, trust_remote_code=trust_remote_code)
    model = load_causal_lm(
        whole, dtype=torch.bfloat16, attention="eager", trust_remote_code=trust_remote_code
    )
    prefix = layers_prefix(model)
    kept = _kept(len(decoder_layers(model)), layers)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in kept:
                continue
            state[f"{prefix}{kept.index(int(number))}.{rest}"] = tensor
        else:
            state[name] = tensor
    save_model_folder(
        config=config,
        state_dict=state,
        dtype=torch.bfloat16,
        generation_config=model.generation_config,
        target=target,
    )
    load_tokenizer(whole, trust_remote_code=trust_remote_code).save_pretrained(target)


def kept_config(
    whole: Path, layers: Sequence[int], *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a model without some layers, checked by building both without weights.

    Raises ModelError where no config describes the layers that are left.
    """
    config = load_config(whole, trust_remote_code=trust_remote_code)
    before = meta_model(config, trust_remote_code=trust_remote_code)
    num_layers = len(decoder_layers(before))
    if max(layers) >= num_layers or len(layers) >= num_layers:
        raise ModelError(
            f"student.model.drop_layers={sorted(layers)}: the teacher has layers 0 to "
            f"{num_layers - 1}, and one must stay"
        )
    kept = _kept(num_layers, layers)
    fields = config.to_dict()
    new = type(config)(**_rewritten(fields, before, kept))
    new.architectures = config.architectures
    after = meta_model(new, trust_remote_code=trust_remote_code)
    _compare(before, after, kept)
    return new


def _kept(num_layers: int, layers: Sequence[int]) -> list[int]:
    return [i for i in range(num_layers) if i not in set(layers)]


def _rewritten(fields: dict[str, Any], model: PreTrainedModel, kept: list[int]) -> dict[str, Any]:
    """The fields of a config for the kept layers of a model."""
    num_layers = len(decoder_layers(model))
    new = dict(fields)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == num_layers:  # one entry per layer
            new[name] = [value[i] for i in kept]
        elif name in LEADING_COUNTS and isinstance(value, int):
            new[name] = sum(i < value for i in kept)
        elif name.endswith("_layers") and _are_numbers(value, num_layers):  # numbers of layers
            new[name] = [place for place, i in enumerate(kept) if i in value]
    name = next(n for n in LAYER_FIELDS if n in fields)
    new[name] = len(kept)
    if fields.get("decoder_sparse_step", 1) != 1:
        # Every so many layers have experts: a list of the dense ones says the same.
        dense = [not _has_experts(layer) for layer in decoder_layers(model)]
        new["decoder_sparse_step"] = 1
        new["mlp_only_layers"] = [place for place, i in enumerate(kept) if dense[i]]
    for leftover in ("transformers_version", "model_type"):
        new.pop(leftover, None)
    return new


def _are_numbers(value: Any, num_layers: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers for i in value
    )


def _has_experts(layer: torch.nn.Module) -> bool:
    return any("experts" in name for name, _ in layer.named_modules())


def _compare(before: PreTrainedModel, after: PreTrainedModel, kept: list[int]) -> None:
    """Raises ModelError for the first kept layer that the new config does not describe."""
    old, new = decoder_layers(before), decoder_layers(after)
    for place, number in enumerate(kept):
        difference = _difference(old[number], new[place])
        if difference:
            raise ModelError(
                f"student.model.drop_layers: {type(before).__name__} has layers of several kinds, "
                f"and its config cannot say what is left: layer {number} ({difference}) would be "
                f"layer {place}; drop others, or make the student with a script of your own"
            )


def _difference(old: torch.nn.Module, new: torch.nn.Module) -> str | None:
    shapes = [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in (old, new)]
    if shapes[0] != shapes[1]:
        changed = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        return f"its parameter {changed}"
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        ours, theirs = _settings(module), _settings(modules[name])
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                place = f"{name}.{key}" if name else key
                return f"its {place} = {ours.get(key)}"
    return None


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """The plain values that a module goes by."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in PLACES and isinstance(value, bool | int | float | str | type(None))
    }
