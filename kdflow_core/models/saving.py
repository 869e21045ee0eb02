"""A state dict as a plain Hugging Face model folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig


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
