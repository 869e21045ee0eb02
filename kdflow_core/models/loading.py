"""Causal language models from local folders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from kdflow_core.errors import ModelError
from kdflow_core.models.checkpoints import TensorHeader, read_checkpoint
from kdflow_core.models.families import architecture_of, known_family
from kdflow_core.models.folders import text_config
from kdflow_core.models.heads import head_tensor
from kdflow_core.models.tokenizers import LIBRARY_ERRORS, reason_of

# Tensors of older checkpoints that models now compute by themselves.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
SHOWN = 5
ROWS_COMPARED = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model folder. Raises ModelError."""
    text_config(folder)  # what would not end, or end in nonsense, is refused before
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"cannot load the model config of {folder}: {reason_of(error)}") from error
    return config


def check_attention(config: PretrainedConfig, attention: str) -> None:
    """Refuse an implementation of attention that is not exact for a model, or not installed.

    Raises ModelError.
    """
    family = known_family(config)
    inexact = {} if family is None else family.inexact_attention(config)
    if attention in inexact:
        raise ModelError(
            f"{architecture_of(config)} {inexact[attention]} without a word; set attention=eager "
            "(or flash_attention_2) for this model"
        )
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelError(
            "attention=flash_attention_2 needs the package flash-attn and a GPU that it knows; "
            "set attention=sdpa"
        )


def checked_folder(
    folder: Path, attention: str, *, trust_remote_code: bool
) -> tuple[PretrainedConfig, dict[str, TensorHeader]]:
    """The config of a model folder and the headers of its weights, which are seen to do for an
    implementation of attention. Raises ModelError.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_attention(config, attention)
    tensors = read_checkpoint(folder).tensors
    check_tied_head(folder, config, tensors)
    return config, tensors


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the CPU by default.

    Raises ModelError, also for weights that are not wholly and exactly the model's.
    """
    checked_folder(folder, attention, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, which is refused
            output_loading_info=True,
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"cannot load the model in {folder}: {reason_of(error)}") from error
    model: PreTrainedModel = loaded[0]
    refuse_incomplete(folder, loaded[1])
    if device is not None:
        torch.nn.Module.to(model, device)
    model.eval()
    return model


def refuse_incomplete(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not wholly and exactly the model's, by transformers' report of
    loading it. Raises ModelError, which names the tensors.
    """
    unexpected = [name for name in report["unexpected_keys"] if not DERIVED.search(name)]
    problems = {
        "lacks": sorted(report["missing_keys"]),
        "has in another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
        "holds, though the model has none of that name,": sorted(unexpected),
    }
    texts = [
        f"{what} {len(names)} tensors ({', '.join(names[:SHOWN])}"
        + (", ...)" if len(names) > SHOWN else ")")
        for what, names in problems.items()
        if names
    ]
    texts += [str(message) for message in report["error_msgs"]]
    if texts:
        raise ModelError(
            f"the checkpoint in {folder} is not the model that its config.json describes: it "
            f"{'; it '.join(texts)}. Loaded like this it would have random weights; save the whole "
            "model anew with save_pretrained (of a compiled or wrapped model, the inner one)"
        )


def check_tied_head(
    folder: Path, config: PretrainedConfig, tensors: Mapping[str, TensorHeader]
) -> None:
    """Refuse a checkpoint whose config ties the head to the embedding, while it holds another one.

    Raises ModelError.
    """
    family = known_family(config)
    if family is None:
        return  # refused by whoever needs its head
    rule = family.head
    if not config.get_text_config().tie_word_embeddings or rule.weight not in tensors:
        return
    embedding = head_tensor(folder, config, tensors)
    if not _equal(tensors[rule.weight], rule.weight, tensors[embedding], embedding):
        raise ModelError(
            f"config.json in {folder} ties the output head to the embedding "
            f"(tie_word_embeddings: true), and the checkpoint holds a '{rule.weight}' of its own, "
            f"unlike '{embedding}'; readers differ in which they take. Set tie_word_embeddings to "
            "false, or take the tensor out"
        )


def _equal(one: TensorHeader, name: str, other: TensorHeader, other_name: str) -> bool:
    """Whether two tensors of files have the same values; read by blocks."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with safe_open(one.path, "pt") as first, safe_open(other.path, "pt") as second:
        a, b = first.get_slice(name), second.get_slice(other_name)
        blocks = range(0, one.shape[0], ROWS_COMPARED)
        return all(torch.equal(a[k : k + ROWS_COMPARED], b[k : k + ROWS_COMPARED]) for k in blocks)
