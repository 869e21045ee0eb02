"""Rectangular batches under a token budget.

Dimensions: B sequences, T tokens (padded), N supervised tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch


def batch_by_tokens(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Indices grouped so that (sequences x longest) stays within `budget` tokens.

    Longest first, so that an out-of-memory shows at once and little is padded. A sequence longer
    than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad_right(sequences: Sequence[np.ndarray], pad_id: int = 0) -> torch.Tensor:
    """Ids [B, T] padded on the right; under causal attention no real row sees the padding."""
    width = max(len(ids) for ids in sequences)
    batch_BT = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    for row, ids in enumerate(sequences):
        batch_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch_BT
