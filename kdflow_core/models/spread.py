"""Models that no device holds whole: their decoder layers on several devices, or in the host's
memory, from which each comes for its part of a forward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import PreTrainedModel

from kdflow_core.models.structure import decoder_layers

# What layers are given of earlier tokens: each layer's own stays where that layer is.
CACHES = ["past_key_values", "past_key_value", "cache_params", "layer_past", "shared_kv_states"]


class Place(NamedTuple):
    """Where a layer computes, and whether it `comes` there from the host's memory each time."""

    device: torch.device
    comes: bool


def layer_places(
    sizes: Sequence[int], rest: int, rooms: Sequence[tuple[torch.device, int]]
) -> list[Place]:
    """Where layers of these sizes go, in order: one device after the other is filled, the first
    also with the `rest` of the model; those for which there is no room come to the first device,
    which then keeps room for two of them. All in bytes.
    """
    places = _filled(sizes, rest, rooms)
    if any(place.comes for place in places):
        places = _filled(sizes, rest + 2 * max(sizes), rooms)
    return places


def _filled(
    sizes: Sequence[int], rest: int, rooms: Sequence[tuple[torch.device, int]]
) -> list[Place]:
    left = [(device, room - (0 if number else rest)) for number, (device, room) in enumerate(rooms)]
    places, taken = [], 0
    for size in sizes:
        while left and taken + size > left[0][1]:
            left.pop(0)
            taken = 0
        places.append(Place(left[0][0], False) if left else Place(rooms[0][0], True))
        taken += size
    return places


def spread_(model: PreTrainedModel, rooms: Sequence[tuple[torch.device, int]]) -> list[Place]:
    """Put a model that is in the host's memory where there is room for it, in bytes; where each of
    its decoder layers is. What it gives is on the first device. Raises ModelError.
    """
    layers = decoder_layers(model)
    sizes = [_bytes(layer) for layer in layers]
    places = layer_places(sizes, _bytes(model) - sum(sizes), rooms)
    for layer, place in zip(layers, places, strict=True):
        hook = AlignDevicesHook(
            execution_device=place.device,
            offload=place.comes,
            io_same_device=True,
            place_submodules=True,
            skip_keys=CACHES,
        )
        add_hook_to_module(layer, hook)
    of_layers = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for tensor in _tensors(model):
        if id(tensor) not in of_layers:
            tensor.data = tensor.data.to(rooms[0][0])  # in place: what is tied stays so
    return places


def comes_in_parts(model: PreTrainedModel) -> bool:
    """Whether layers of a model come from the host's memory for each forward pass."""
    return any(parameter.is_meta for parameter in model.parameters())


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in _tensors(module))
