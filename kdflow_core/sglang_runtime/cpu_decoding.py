"""Decoding attention on a plain CPU: all requests of about one length at once.

SGLang's own takes one request after the other, in every layer, which for a small model is half of
the time of a step.

Dimensions: B requests, L tokens of a request, Q heads, K key/value heads, D head size.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

_one_by_one = TorchNativeAttnBackend._run_sdpa_forward_decode


def decode_together() -> None:
    """Have SGLang's backend for CPUs decode so, in this process."""
    TorchNativeAttnBackend._run_sdpa_forward_decode = _decode


def _decode(
    backend: TorchNativeAttnBackend,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **told: Any,
) -> torch.Tensor:
    """`query` [B, Q, D] to the tokens that requests have in the cache, written into `output`."""
    if encoder_lens is not None or told.get("is_cross_attn"):
        whole: torch.Tensor = _one_by_one(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
            encoder_lens, **told,
        )  # fmt: skip
        return whole
    window = told.get("sliding_window_size")
    for rows in _of_like_length(seq_lens.tolist()):
        lengths_B1 = seq_lens[rows].unsqueeze(1)
        longest = int(lengths_B1.max())
        position_L = torch.arange(longest)
        mask_BL = position_L < lengths_B1
        if window is not None and window > -1:
            mask_BL &= position_L >= lengths_B1 - 1 - window
        tokens_BL = req_to_token[req_pool_indices[rows], :longest].long()
        # What is masked must be finite all the same: any value that is read anyway.
        last_B1 = tokens_BL.gather(1, lengths_B1.long() - 1)
        tokens_BL = torch.where(mask_BL, tokens_BL, last_B1)
        q_BQ1D = query[rows].unsqueeze(2)
        k_BKLD, v_BKLD = (
            cache[tokens_BL].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache)
        )
        output[rows] = torch.nn.functional.scaled_dot_product_attention(
            q_BQ1D,
            k_BKLD,
            v_BKLD,
            attn_mask=mask_BL[:, None, None, :],
            scale=told.get("scaling"),
            enable_gqa=bool(told.get("enable_gqa")),
        ).squeeze(2)
    return output


def _of_like_length(lengths: list[int]) -> list[list[int]]:
    """Rows whose lengths are within a factor of two, so that at most half is padding."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(row)
    return list(groups.values())
