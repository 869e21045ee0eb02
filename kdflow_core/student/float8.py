"""A moment of every weight in one byte: float8 numbers in groups that share a scale.

As in COAT (arXiv 2410.19313, section 3), numbers are `float8_e4m3fn` (three bits behind the leading
one) times the scale of their group, some numbers of a row. A moment changes by less in a step than
lies between two such numbers, so they are rounded up or down at random, right on average. Of the
second moment the root is kept, which needs half as many powers of two, and what is not 0 never
becomes 0: a step divides by it.

Dimensions: R rows, M numbers of a row, G groups of a row.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from configs.schema.student import FLOAT8_GROUP
from kdflow_core.models.partial_loading import own_part
from kdflow_core.student.rounding import cut, noise_for

MOST = 448.0  # the largest number
LEAST_NORMAL = 2.0**-6
SPACING = 2.0**-9  # of numbers below that, and the least but 0
CUT_BITS = 20  # float32 has so many more behind the leading one


def scales_of(parameter: torch.Tensor) -> torch.Tensor:
    """A scale of 0 for every group of the last dimension, spread over the ranks as `parameter` is
    along its first one.
    """
    groups = -(-parameter.shape[-1] // FLOAT8_GROUP)
    own = own_part(parameter)
    scales = torch.zeros(*own.shape[:-1], groups, dtype=torch.float32, device=own.device)
    if not isinstance(parameter, DTensor):
        return scales
    shape = torch.Size((*parameter.shape[:-1], groups))
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        scales, parameter.device_mesh, parameter.placements, shape=shape, stride=strides
    )


def unpacked(codes_RM: torch.Tensor, scales_RG: torch.Tensor, *, is_root: bool) -> torch.Tensor:
    """The float32 numbers; squared where they are roots."""
    exact_RM = codes_RM.float() * _spread(scales_RG, codes_RM.shape[1])
    return exact_RM.square_() if is_root else exact_RM


def pack_(
    codes_RM: torch.Tensor,
    scales_RG: torch.Tensor,
    exact_RM: torch.Tensor,
    *,
    is_root: bool,
    draws: torch.Generator,
) -> None:
    """Keep float32 numbers, or with `is_root` the roots of what is not below 0."""
    values_RM = exact_RM.sqrt() if is_root else exact_RM
    columns = values_RM.shape[1]
    padded_RM = F.pad(values_RM, (0, -columns % FLOAT8_GROUP))
    largest_RG = padded_RM.view(len(padded_RM), -1, FLOAT8_GROUP).abs().amax(2)
    scales_RG.copy_(largest_RG / MOST)
    # A group of zeros has the scale 0: they stay zeros.
    divisors_RG = torch.where(scales_RG > 0, scales_RG, 1.0)
    scaled_RM = values_RM / _spread(divisors_RG, columns)
    rounded_RM = _rounded(scaled_RM.clamp_(-MOST, MOST), draws)
    if is_root:
        rounded_RM = torch.where(scaled_RM > 0, rounded_RM.clamp_min(SPACING), rounded_RM)
    codes_RM.copy_(rounded_RM)


def _rounded(scaled: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Numbers up to `MOST` rounded to one of their two neighbours in float8, to each the more often
    the nearer it is. What is not a number stays so.
    """
    noise = noise_for(scaled, CUT_BITS, draws)
    normal = cut(scaled, noise, CUT_BITS)
    share = noise.float().mul_(2.0**-CUT_BITS)
    small = (scaled.abs() / SPACING).add_(share).floor_().mul_(SPACING).copysign_(scaled)
    rounded = torch.where(scaled.abs() < LEAST_NORMAL, small, normal)
    return torch.where(scaled.isfinite(), rounded, scaled)


def _spread(scales_RG: torch.Tensor, columns: int) -> torch.Tensor:
    """Every number's own scale."""
    return scales_RG.repeat_interleave(FLOAT8_GROUP, 1)[:, :columns]
