"""Models as plain Hugging Face folders: a state dict at once, or weights as they come."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save


def save_model_folder(
    *,
    config: PretrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    generation_config: GenerationConfig | None,
    target: Path,
) -> None:
    """Write safetensors, config and generation config; the weights are cast to `dtype`."""
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in state_dict.items()}, assign=True)
    model.tie_weights()
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(target)


def save_description(model: PreTrainedModel, *, dtype: torch.dtype, target: Path) -> None:
    """Write all that `save_pretrained` writes beside the weights, which are saved as `dtype`."""
    target.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    if model._auto_class is not None:  # code that came with the model
        custom_object_save(model, target, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong into a checkpoint, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


class WeightFiles:
    """The safetensors of a model folder, one after the other, and their index where there are
    several.
    """

    def __init__(self, target: Path, number: int) -> None:
        self._target = target
        self._number = number
        self._file_of: dict[str, str] = {}
        self._values = self._bytes = self._written = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next file; the index with the last one."""
        self._written += 1
        name = "model.safetensors"
        if self._number > 1:
            name = f"model-{self._written:05d}-of-{self._number:05d}.safetensors"
        whole = {n: tensor.contiguous() for n, tensor in tensors.items()}
        save_file(whole, self._target / name, metadata={"format": "pt"})
        self._file_of |= dict.fromkeys(whole, name)
        self._values += sum(tensor.numel() for tensor in whole.values())
        self._bytes += sum(tensor.nbytes for tensor in whole.values())
        if self._written == self._number > 1:
            sizes = {"total_parameters": self._values, "total_size": self._bytes}
            index = {"metadata": sizes, "weight_map": self._file_of}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
