"""What a lossy form of the stored states costs: distributions from exact and from stored rows.

Dimensions: N rows, H hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch

from kdflow_core.contracts import OutputHead
from kdflow_core.losses.logits import LogitProducer


@torch.inference_mode()
def compare_states(
    head: OutputHead, exact_NH: torch.Tensor, stored_NH: torch.Tensor
) -> dict[str, float]:
    """Over rows of bfloat16 states: their number, sum and largest of KL(exact || stored) in nats,
    and how many keep their top-1 token.
    """
    logits = LogitProducer(head, torch.float32)
    device = head.weight_VH.device
    log_p_NV = torch.log_softmax(logits.logits(exact_NH.to(device)).double(), -1)
    log_q_NV = torch.log_softmax(logits.logits(stored_NH.to(device)).double(), -1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).clamp(min=0)
    return {
        "rows": float(len(kl_N)),
        "kl_sum": float(kl_N.sum()),
        "kl_max": float(kl_N.max()),
        "same_top1": float((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).sum()),
    }


def codec_loss(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """The comparisons of several shards as one: means over rows, in nats."""
    rows = sum(part["rows"] for part in measured)
    return {
        "rows": rows,
        "kl_mean": sum(part["kl_sum"] for part in measured) / rows,
        "kl_max": max(part["kl_max"] for part in measured),
        "same_top1": sum(part["same_top1"] for part in measured) / rows,
    }
