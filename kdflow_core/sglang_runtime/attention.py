"""Prefill attention on a plain CPU, straight from queries, keys and values.

SGLang's own backend for this case copies them through the cache and knows no soft-cap. We run
whole sequences and never decode from them, so the cache is not needed.

Dimensions: T tokens of a batch, L tokens of a sequence, Q heads, K key/value heads, D head size.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType

from kdflow_core.errors import ModelError


class PrefillAttention(TorchNativeAttnBackend):
    """Causal attention within each sequence of a packed batch."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,  # noqa: ARG002 - SGLang's signature
        **extras: Any,
    ) -> torch.Tensor:
        """Attention output [T, Q * D]. Raises ModelError for what it does not know."""
        unknown = sorted(name for name, value in extras.items() if value is not None)
        if unknown or k is None or layer.is_cross_attention:
            raise ModelError(
                "SGLang on a CPU cannot run this model's attention "
                f"({', '.join(unknown) or layer}); set teacher.type=transformers"
            )
        if layer.attn_type != AttentionType.DECODER:
            raise ModelError("a teacher must be a decoder; its attention is not causal")
        q_TQD = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_TKD = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v_TKD = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        lengths = forward_batch.extend_seq_lens_cpu
        parts = zip(*(torch.split(x, lengths) for x in (q_TQD, k_TKD, v_TKD)), strict=True)
        return torch.cat([_attend(q, k, v, layer) for q, k, v in parts]).flatten(1)


def _attend(
    q_LQD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, layer: Any
) -> torch.Tensor:
    q_QLD, k_KLD, v_KLD = (x.transpose(0, 1) for x in (q_LQD, k_LKD, v_LKD))
    mask_LL = None
    if 0 <= layer.sliding_window_size < len(q_LQD):
        position_L = torch.arange(len(q_LQD))
        distance_LL = position_L[:, None] - position_L[None, :]
        mask_LL = (distance_LL >= 0) & (distance_LL <= layer.sliding_window_size)
    if layer.logit_cap:
        out_QLD = _capped(q_QLD, k_KLD, v_KLD, mask_LL, layer)
    else:
        out_QLD = torch.nn.functional.scaled_dot_product_attention(
            q_QLD[None],
            k_KLD[None],
            v_KLD[None],
            attn_mask=mask_LL,
            is_causal=mask_LL is None,
            scale=layer.scaling,
            enable_gqa=q_QLD.shape[0] != k_KLD.shape[0],
        )[0]
    return out_QLD.transpose(0, 1)


def _capped(
    q_QLD: torch.Tensor,
    k_KLD: torch.Tensor,
    v_KLD: torch.Tensor,
    mask_LL: torch.Tensor | None,
    layer: Any,
) -> torch.Tensor:
    """softmax(cap * tanh(scale * q k^T / cap)) v, in float32 (Gemma 2, 2408.00118, section 2)."""
    repeats = q_QLD.shape[0] // k_KLD.shape[0]
    k_QLD, v_QLD = (x.repeat_interleave(repeats, 0) for x in (k_KLD, v_KLD))
    scores_QLL = (q_QLD @ k_QLD.transpose(1, 2)).float() * layer.scaling
    scores_QLL = layer.logit_cap * torch.tanh(scores_QLL / layer.logit_cap)
    if mask_LL is None:
        mask_LL = torch.ones(scores_QLL.shape[1:], dtype=torch.bool).tril()
    weights_QLL = scores_QLL.masked_fill(~mask_LL, float("-inf")).softmax(-1)
    out_QLD: torch.Tensor = weights_QLL.to(v_QLD.dtype) @ v_QLD
    return out_QLD
