"""Tokenizers and causal language models from local folders."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdflow_core.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {folder}: {error}") from error


def load_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder. Raises ModelError."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model config of {folder}: {error}") from error
    return config


def load_causal_lm(
    folder: Path, *, dtype: torch.dtype, attention: str, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the CPU by default. Raises ModelError."""
    config = load_config(folder)
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        raise ModelError(
            f"{(config.architectures or ['the model'])[0]} caps its attention scores, which "
            "attention=sdpa leaves out without a word; set attention=eager (or flash_attention_2) "
            "for this model"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load the model in {folder}: {error}") from error
    if device is not None:
        torch.nn.Module.to(model, device)
    model.eval()
    return model


def true_vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id. Rows of the head beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Refuse two tokenizers that give ids different meanings. Raises ModelError."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    )
    token = differing[0]
    raise ModelError(
        f"student and teacher have different vocabularies: {len(ours)} and {len(theirs)} tokens, "
        f"{len(differing)} differ, for instance {token!r} (id {ours.get(token)} and "
        f"{theirs.get(token)}). Their logits cannot be compared; choose a student of the teacher's "
        "family (same tokenizer)"
    )
