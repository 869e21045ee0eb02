"""Attention of rows that stand behind one another, each for itself, without padding.

Under the name `PACKED` transformers' models find it. On CUDA in half precision it is torch's own
kernel for rows of many lengths (`torch.nn.attention.varlen`); elsewhere each row is attended by
itself, which on a CPU is the fastest there is. A call that is told of no rows has them in its
batch, padded on the right.

Dimensions: B sequences, T tokens, Q heads, K key/value heads, D and E head sizes, R packed rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from kdflow_core.batching import Division, pad_right
from kdflow_core.errors import ModelError
from kdflow_core.models.families import architecture_of, known_family
from kdflow_core.models.families.base import attention_length, batched_length
from kdflow_core.uploads import upload

PACKED = "kdflow_packed"
MOST_HEAD_SIZE = 256  # that the kernel takes
_has_packed_rows: ContextVar[bool] = ContextVar("_has_packed_rows", default=False)


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Where rows that stand behind one another begin and end: int32 [R + 1], on the host."""

    edges: np.ndarray

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What a model is told of them, as transformers names it."""
        lengths = np.diff(self.edges)
        positions_T = np.arange(self.edges[-1]) - np.repeat(self.edges[:-1], lengths)
        edges = torch.from_numpy(self.edges)
        longest = int(lengths.max())
        return {
            "position_ids": upload(torch.from_numpy(positions_T)[None], device),
            "cu_seq_lens_q": upload(edges, device),
            "cu_seq_lens_k": edges,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@contextmanager
def told_of(packed: PackedRows | None) -> Iterator[None]:
    """While a model runs that is told of packed rows, its attention insists on being told, too."""
    token = _has_packed_rows.set(packed is not None)
    try:
        yield
    finally:
        _has_packed_rows.reset(token)


def lay_out(
    sequences: Sequence[np.ndarray], *, packed: bool
) -> tuple[torch.Tensor, PackedRows | None]:
    """Ids [B, T] of a batch, on the host: padded on the right, or behind one another in one row."""
    if not packed:
        return pad_right(sequences), None
    edges = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return pad_right([np.concatenate(sequences)]), PackedRows(edges=edges)


def packs(
    config: PretrainedConfig,
    *,
    packing: bool | Literal["auto"],
    attention: str,
    trust_remote_code: bool = False,
) -> bool:
    """Whether rows of a model's batches are packed, with `auto` where that is exact. Raises
    ModelError where it is asked for and is not.
    """
    if packing is False:
        return False
    family, name = known_family(config), architecture_of(config)
    reasons = {
        f"attention={attention} has no packed form (sdpa has)": attention != "sdpa",
        f"{name} does not keep packed rows apart": family is None or name in family.unpacked,
        f"{name} is run by the checkpoint's own code": trust_remote_code,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None and packing is True:
        raise ModelError(f"packing=true: {reason}; set student.packing=auto")
    return reason is None


def model_division(
    config: PretrainedConfig,
    text: Mapping[str, Any],
    *,
    tokens: int,
    packing: bool | Literal["auto"],
    attention: str,
    trust_remote_code: bool,
) -> Division:
    """How sequences are divided into a model's batches of so many `tokens`, by its config and text
    config; see `packs`. A packed model is loaded with `PACKED` in place of its `attention`.
    """
    return Division(
        tokens=tokens,
        batched_length=batched_length(text),
        packed=packs(
            config,
            packing=packing,
            attention=attention,
            trust_remote_code=trust_remote_code,
        ),
        attention_length=attention_length(text),
    )


def packed_attention(
    module: torch.nn.Module,
    query_BQTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: [B, T, Q, E]. Raises ModelError for what it leaves out."""
    unknown = [name for name in ("softcap", "s_aux") if told.get(name) is not None]
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"the attention of {type(module).__name__} has more than causal rows "
            f"({', '.join(unknown) or 'a mask'}); set student.packing=false"
        )
    device = query_BQTD.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings have made float32 of them
        dtype = torch.get_autocast_dtype(device)
        query_BQTD, key_BKTD, value_BKTE = (x.to(dtype) for x in (query_BQTD, key_BKTD, value_BKTE))
    # On the host, so that nothing waits for a device.
    edges = told.get("cu_seq_lens_k")
    if edges is None:
        if not torch.compiler.is_compiling() and _has_packed_rows.get():
            raise ModelError(
                f"transformers {transformers.__version__} does not tell {type(module).__name__} "
                "where packed rows begin, which would run into one another; set student.packing="
                "false, or install a release that kdflow is tested with"
            )
        attended = _attend(query_BQTD, key_BKTD, value_BKTE, scaling, dropout, sliding_window)
        return attended.transpose(1, 2).contiguous(), None
    if _has_kernel(query_BQTD, value_BKTE, dropout):
        q_TQD, k_TKD, v_TKD = (
            x.squeeze(0).transpose(0, 1) for x in (query_BQTD, key_BKTD, value_BKTE)
        )
        by_kernel = varlen_attn(
            q_TQD,
            k_TKD,
            v_TKD,
            told["cu_seq_lens_q"],
            told["cu_seq_lens_q"],
            told["max_length_q"],
            told["max_length_q"],
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=q_TQD.shape[1] != k_TKD.shape[1],
        )
        assert isinstance(by_kernel, torch.Tensor)
        return by_kernel.unsqueeze(0), None
    rows = [
        _attend(
            query_BQTD[:, :, begin:end],
            key_BKTD[:, :, begin:end],
            value_BKTE[:, :, begin:end],
            scaling,
            dropout,
            sliding_window,
        )
        for begin, end in pairwise(edges.tolist())
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def _has_kernel(query_BQTD: torch.Tensor, value_BKTE: torch.Tensor, dropout: float) -> bool:
    """Whether torch's kernel for rows of many lengths does it."""
    half, head = query_BQTD.dtype in (torch.bfloat16, torch.float16), query_BQTD.shape[-1]
    same = value_BKTE.shape[-1] == head <= MOST_HEAD_SIZE
    return query_BQTD.is_cuda and half and same and not dropout


def _attend(
    query_BQTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Every row of a batch by itself: [B, Q, T, E]."""
    length, mask_TT = query_BQTD.shape[2], None
    if window is not None and window < length:
        position_T = torch.arange(length, device=query_BQTD.device)
        distance_TT = position_T[:, None] - position_T[None, :]
        mask_TT = (distance_TT >= 0) & (distance_TT < window)
    return scaled_dot_product_attention(
        query_BQTD,
        key_BKTD,
        value_BKTE,
        attn_mask=mask_TT,
        dropout_p=dropout,
        is_causal=mask_TT is None,
        scale=scaling,
        enable_gqa=query_BQTD.shape[1] != key_BKTD.shape[1],
    )


AttentionInterface.register(PACKED, packed_attention)
