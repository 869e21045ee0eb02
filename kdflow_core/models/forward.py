"""The one forward pass that all parts share: token ids in, post-norm hidden states out.

Dimensions: B sequences, T tokens (padded), H hidden size.
"""

import torch


def post_norm_states(base: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """The states [B, T, H] that the output head reads: those of the base model, after its last
    norm. Rows are padded on the right; see `padding_is_exact` for where that changes none of them.
    """
    hidden_BTH: torch.Tensor = base(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTH
