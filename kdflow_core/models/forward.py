"""The one forward pass that all parts share: token ids in, post-norm hidden states out.

Dimensions: B sequences, T tokens (padded), H hidden size, E experts.
"""

from typing import Any

import torch

from kdflow_core.models.packing import PackedRows, told_of


def post_norm_states(
    base: torch.nn.Module, ids_BT: torch.Tensor, packed: PackedRows | None = None
) -> torch.Tensor:
    """The states [B, T, H] that the output head reads: those of the base model, after its last
    norm. Rows are padded on the right; see `batched_length` for where that changes none of them.
    With `packed` there is one row, of rows behind one another: see `packs`.
    """
    hidden_BTH: torch.Tensor = _outputs(base, ids_BT, packed).last_hidden_state
    return hidden_BTH


def routed_states(
    base: torch.nn.Module, ids_BT: torch.Tensor, packed: PackedRows | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Those states, and of each layer with experts the logits [B * T, E] of its router."""
    outputs = _outputs(base, ids_BT, packed, output_router_logits=True)
    return outputs.last_hidden_state, outputs.router_logits


def _outputs(
    base: torch.nn.Module, ids_BT: torch.Tensor, packed: PackedRows | None, **asked: bool
) -> Any:
    _forget_lengths(base)
    told = {} if packed is None else packed.arguments(ids_BT.device)
    with told_of(packed):
        return base(input_ids=ids_BT, use_cache=False, **told, **asked)


def _forget_lengths(base: torch.nn.Module) -> None:
    """Let rotary embeddings of the type `dynamic` go by this batch alone: those of transformers
    keep the frequencies of the longest one that they have seen.
    """
    rotary = getattr(base, "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", None)
    if rotary is None or "dynamic" not in (kinds.values() if isinstance(kinds, dict) else [kinds]):
        return
    for name, frequencies in list(rotary.named_buffers(recurse=False)):
        prefix = name.removesuffix("inv_freq")
        original = getattr(rotary, f"{prefix}original_inv_freq", None)
        if name.endswith("inv_freq") and original is not None:
            setattr(rotary, name, original.to(frequencies.device))
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
