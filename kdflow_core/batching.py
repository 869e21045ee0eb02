"""Rectangular batches under a token budget, and the teacher's rows for them.

Dimensions: B sequences, T tokens (padded), N supervised tokens, G hidden size of the teacher.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kdflow_core.contracts import Example, HiddenStateSource
from kdflow_core.errors import AlignmentError


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


def pad_right(sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Ids [B, T] padded on the right; under causal attention no real row sees the padding."""
    width = max(len(ids) for ids in sequences)
    batch_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, ids in enumerate(sequences):
        batch_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return batch_BT


def teacher_rows(example: Example, states: HiddenStateSource) -> torch.Tensor:
    """The teacher's states [N, G] for an example's supervised tokens.

    Raises AlignmentError when rows and the student's tokens differ in number.
    """
    rows_NG = states.rows_NH(example.teacher)
    num_tokens = len(example.student.target_positions_N)
    if len(rows_NG) != num_tokens:
        raise AlignmentError(f"{len(rows_NG)} teacher rows for {num_tokens} student tokens")
    return rows_NG
