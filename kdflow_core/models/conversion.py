"""Models made from models: a GGUF file dequantized, a teacher with layers taken out."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdflow_core.errors import ModelError
from kdflow_core.models.loading import load_causal_lm, load_tokenizer
from kdflow_core.models.saving import save_model_folder


def convert_gguf(gguf: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder (safetensors, tokenizer, chat template) from a GGUF file.

    Raises ModelError when transformers cannot read it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot read {gguf}: {error}") from error
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


def drop_layers(source: Path, target: Path, layers: tuple[int, ...]) -> None:
    """Write a copy of a model without the given decoder layers. Raises ModelError."""
    model = load_causal_lm(source, dtype=torch.bfloat16, attention="eager")
    decoder = getattr(model.base_model, "layers", None)
    if decoder is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers to drop from")
    num_layers = len(decoder)
    if max(layers) >= num_layers or len(layers) >= num_layers:
        raise ModelError(
            f"student.model.drop_layers={sorted(layers)}: the teacher has layers 0 to "
            f"{num_layers - 1}, and one must stay"
        )
    keep = [i for i in range(num_layers) if i not in layers]
    model.base_model.layers = torch.nn.ModuleList([decoder[i] for i in keep])
    for name, value in model.config.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers:  # one entry per layer
            setattr(model.config, name, [value[i] for i in keep])
    model.config.num_hidden_layers = len(keep)
    model.save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)
