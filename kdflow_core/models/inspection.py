"""Whether a model can be used as a run wants it, from its config and headers alone: in seconds, for
a model of any size, without a GPU.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from configs.schema.student import ParameterGroup
from kdflow_core.errors import ModelError
from kdflow_core.models.checkpoints import Checkpoint, read_checkpoint
from kdflow_core.models.families import architecture_of, family_of
from kdflow_core.models.heads import head_tensor
from kdflow_core.models.loading import (
    check_attention,
    check_tied_head,
    load_config,
    refuse_incomplete,
)
from kdflow_core.models.packing import packs
from kdflow_core.models.routing import routing_of
from kdflow_core.models.structure import adapter_targets, decoder_layers, meta_model, named_groups
from kdflow_core.models.tokenizers import load_tokenizer, true_vocabulary_size

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a run wants of a model.

    `attentions` are those with which transformers runs it; `in_sglang`: SGLang loads it, and
    `answers_in_sglang`: also to write answers. `trained`: it is the student, maybe with its rows
    packed by an attention (`packs_with`), with adapters on `lora_targets` (None: no adapters;
    empty: on all layers), with some parameters in `parameter_groups`, with a weight of its routers'
    balance, with compiled layers or activations computed again (`checkpointing`), or with its head
    spread over ranks.
    """

    attentions: tuple[str, ...] = ()
    in_sglang: bool = False
    answers_in_sglang: bool = False
    trained: bool = False
    packs_with: str | None = None
    lora_targets: tuple[str, ...] | None = None
    parameter_groups: tuple[ParameterGroup, ...] = ()
    router_weight: float | None = None
    compiled: bool = False
    checkpointing: bool = False
    vocabulary_parallel: bool = False
    trust_remote_code: bool = False


def check_model(folder: Path, use: Use) -> None:
    """Raises ModelError, which names what is wrong and what to do."""
    config = load_config(folder, trust_remote_code=use.trust_remote_code)
    family_of(config)
    for attention in use.attentions:
        check_attention(config, attention)
        if use.trained and attention == "flex_attention" and not torch.cuda.is_available():
            raise ModelError(
                "attention=flex_attention has no backward pass on a CPU; set attention=sdpa"
            )
    model = meta_model(config, trust_remote_code=use.trust_remote_code)
    checkpoint = read_checkpoint(folder)
    check_tied_head(folder, config, checkpoint.tensors)
    _check_tensors(folder, config, model, checkpoint)
    _check_head(folder, config, checkpoint, use)
    if use.in_sglang:
        _check_names(folder, config, checkpoint)
    if use.answers_in_sglang and not torch.cuda.is_available():
        _check_caps(config)
    if use.trained:
        check_trainable(model, use)
        rehearse_export(folder, trust_remote_code=use.trust_remote_code)


def _check_caps(config: PretrainedConfig) -> None:
    """SGLang's decoding on a CPU leaves out soft-caps, of attention without a word."""
    family = family_of(config)
    attention = family.capped_attention and getattr(config, family.capped_attention, None)
    if attention or family.scale_and_softcap(config)[1] is not None:
        raise ModelError(
            f"SGLang on a CPU writes answers without the soft-caps that {architecture_of(config)} "
            "has; set the type of the engine that writes them to transformers"
        )


def _check_tensors(
    folder: Path, config: PretrainedConfig, model: PreTrainedModel, checkpoint: Checkpoint
) -> None:
    """Let transformers load tensors without values, of the names and shapes that the files have."""
    if getattr(config, "quantization_config", None) is not None:
        return  # its names are those of the quantization; who loads it, refuses
    state = {
        name: torch.empty(header.shape, dtype=DTYPES.get(header.dtype), device="meta")
        for name, header in checkpoint.tensors.items()
    }
    if config.get_text_config().tie_word_embeddings:
        state.pop(family_of(config).head.weight, None)  # equal to the embedding, as was checked
    try:
        loaded: Any = type(model).from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load the weights in {folder}: {error}") from error
    refuse_incomplete(folder, loaded[1])


def _check_head(folder: Path, config: PretrainedConfig, checkpoint: Checkpoint, use: Use) -> None:
    tokenizer = load_tokenizer(folder, trust_remote_code=use.trust_remote_code)
    size = true_vocabulary_size(tokenizer)
    head = head_tensor(folder, config, checkpoint.tensors)
    rows = checkpoint.tensors[head].shape[0]
    if rows < size:
        raise ModelError(
            f"the head in {folder} ('{head}') has {rows} rows, the tokenizer {size} ids: model and "
            "tokenizer do not belong together; resize the embeddings, or take the model's own "
            "tokenizer"
        )


def _check_names(folder: Path, config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """SGLang passes over tensors whose names it does not know, without a word."""
    family = family_of(config)
    if family.loads_bare_names:
        return
    embedding = family.head.embedding
    if embedding not in checkpoint.tensors:
        example = next(iter(checkpoint.tensors))
        raise ModelError(
            f"the tensors in {folder} have other names ('{example}') than those that SGLang loads "
            f"('{embedding}'); load the model in transformers and save it anew with "
            "save_pretrained, or set the engine's type to transformers"
        )


def check_trainable(model: PreTrainedModel, use: Use) -> None:
    """Whether the student's side knows how to shard and adapt a model. Raises ModelError."""
    decoder_layers(model)
    if use.packs_with is not None:
        trusts = use.trust_remote_code
        packs(model.config, packing=True, attention=use.packs_with, trust_remote_code=trusts)
    if use.lora_targets is not None:
        adapter_targets(model, use.lora_targets or None)
    named_groups(dict(model.named_parameters()), use.parameter_groups)
    routing_of(model, use.router_weight, compiled=use.compiled)
    if use.checkpointing and not model.supports_gradient_checkpointing:
        raise ModelError(
            f"student.activation_checkpointing: {type(model).__name__} does not have it in "
            "transformers; leave it out, and lower student.micro_batch_tokens where memory is short"
        )
    if use.vocabulary_parallel and model.config.get_text_config().tie_word_embeddings:
        raise ModelError(
            f"student.vocabulary_parallel: the output head of {type(model).__name__} is its "
            "embedding (tie_word_embeddings), which every rank needs whole; turn it off"
        )


def rehearse_export(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Save what export saves beside the weights. Raises ModelError where that cannot be done."""
    with tempfile.TemporaryDirectory() as target:
        try:
            if (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder).save_pretrained(target)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{folder / 'generation_config.json'} cannot be saved with the trained student: "
                f"{error} Mend or remove that file"
            ) from error
        try:
            load_config(folder, trust_remote_code=trust_remote_code).save_pretrained(target)
            load_tokenizer(folder, trust_remote_code=trust_remote_code).save_pretrained(target)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"config or tokenizer of {folder} cannot be saved with the trained student: {error}"
            ) from error
