"""A GGUF file, dequantized into a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from kdflow_core.errors import ModelError
from kdflow_core.models.loading import refuse_incomplete
from kdflow_core.models.saving import save_model_folder


def convert_gguf(gguf: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder (safetensors, tokenizer, chat template) from a GGUF file.

    Raises ModelError when transformers cannot read it.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot read {gguf}: {error}") from error
    model: PreTrainedModel = loaded[0]
    refuse_incomplete(gguf, loaded[1])
    fields = model.config.to_dict()
    # A model that came from GGUF counts as quantized and refuses to be saved; the weights are
    # plain by now, so they move to a fresh model of the same config.
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    config = type(model.config)(**fields)
    config.architectures = [type(model).__name__]
    # The converted tokenizer does not know the file's own EOS; the config does.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    save_model_folder(
        config=config,
        state_dict=model.state_dict(),
        dtype=dtype,
        generation_config=GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ),
        target=target,
    )
    tokenizer.save_pretrained(target)
