"""Output heads: what turns the last hidden states of an architecture into logits.

A head is built by the rule of its family and then verified against the model's own logits.

Dimensions: B batch, T tokens, V vocabulary, H hidden size.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.models.checkpoints import TensorHeader, read_checkpoint
from kdflow_core.models.families import family_of
from kdflow_core.models.forward import post_norm_states


def load_head(folder: Path, config: PretrainedConfig, vocabulary_size: int) -> OutputHead:
    """A checkpoint's head, reading no other tensor; rows beyond `vocabulary_size` are left out.

    Raises ModelError.
    """
    rule = family_of(config).head
    tensors = read_checkpoint(folder).tensors
    name = head_tensor(folder, config, tensors)
    weight_VH = _read_rows(tensors[name].path, name, vocabulary_size)
    if weight_VH.shape[0] < vocabulary_size:
        raise ModelError(
            f"the head in {folder} has {weight_VH.shape[0]} rows, the tokenizer {vocabulary_size} "
            "ids: model and tokenizer do not belong together"
        )
    bias_V = None
    if rule.bias in tensors:  # of a tied head, too
        bias_V = _read_rows(tensors[rule.bias].path, rule.bias, vocabulary_size)
    scale, softcap = family_of(config).scale_and_softcap(config)
    return OutputHead(weight_VH=weight_VH, bias_V=bias_V, logit_scale=scale, softcap=softcap)


def head_tensor(folder: Path, config: PretrainedConfig, tensors: Mapping[str, TensorHeader]) -> str:
    """The name of the tensor that is the output head: the embedding where they are tied.

    Raises ModelError where the checkpoint has none.
    """
    rule = family_of(config).head
    name = rule.weight
    if config.get_text_config().tie_word_embeddings:
        # Checkpoints of the bare model have no prefix.
        bare = rule.embedding.partition(".")[2]
        name = bare if bare in tensors and rule.embedding not in tensors else rule.embedding
    if name not in tensors:
        raise ModelError(f"{folder} holds no tensor '{name}', the output head by its architecture")
    return name


def live_head(model: PreTrainedModel, vocabulary_size: int) -> OutputHead:
    """The head of a model in memory (views of its parameters)."""
    linear = model.get_output_embeddings()
    scale, softcap = family_of(model.config).scale_and_softcap(model.config)
    bias_V = getattr(linear, "bias", None)
    return OutputHead(
        weight_VH=linear.weight[:vocabulary_size],
        parameter=linear.weight,
        bias_V=None if bias_V is None else bias_V[:vocabulary_size],
        logit_scale=scale,
        softcap=softcap,
    )


def apply_head(hidden_TH: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """float32 logits [T, V]. For small T only: it holds all of them."""
    logits_TV = hidden_TH.float() @ head.weight_VH.float().T
    if head.bias_V is not None:
        logits_TV += head.bias_V.float()
    logits_TV *= head.logit_scale
    if head.softcap is not None:
        logits_TV = head.softcap * torch.tanh(logits_TV / head.softcap)
    return logits_TV


def head_digest(head: OutputHead) -> str:
    """32 hex digits (BLAKE2b) over everything that turns states into logits."""
    hasher = hashlib.blake2b(digest_size=16)
    for tensor in (head.weight_VH, head.bias_V):
        if tensor is not None:
            hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    hasher.update(f"{head.logit_scale!r} {head.softcap!r}".encode())
    return hasher.hexdigest()


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: OutputHead) -> None:
    """Compare logits rebuilt from hidden states with the model's own. Raises ModelError."""
    size = head.weight_VH.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, size, (1, 8), generator=generator).to(model.device)
    own_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :, :size].float().cpu()
    hidden_BTH = post_norm_states(model.base_model, ids_BT)
    rebuilt_TV = apply_head(hidden_BTH[0].cpu(), head)
    error = ((rebuilt_TV - own_TV).norm() / own_TV.norm()).item()
    # bfloat16 products round at 2^-8; a forgotten scale, cap or bias is off by far more.
    if not error < 0.02:
        raise ModelError(
            f"logits rebuilt from the hidden states of {type(model).__name__} differ from the "
            f"model's own (relative error {error:.3g}): its head is not understood"
        )


def _read_rows(path: Path, name: str, num_rows: int) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(name)[:num_rows]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read tensor '{name}' of {path}: {error}") from error
    return rows
