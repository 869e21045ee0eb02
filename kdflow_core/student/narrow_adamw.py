"""AdamW (arXiv 1711.05101) on weights in bfloat16, or with moments in bfloat16 or float8.

A usual step of a weight is less than half of what lies between two neighbours in bfloat16, and
would be rounded away every time. Steps are computed in float32, and what is kept in bfloat16 is
rounded up or down at random (see `rounding`).

Dimensions: E elements of this rank's part of a parameter, some at a time; M of its last dimension.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from kdflow_core.models.partial_loading import own_part
from kdflow_core.student.float8 import pack_, scales_of, unpacked
from kdflow_core.student.rounding import cut, noise_for

CHUNK = 1 << 22  # elements at a time, each of which takes about 40 bytes meanwhile
CUT_BITS = 16  # float32 has so many more than bfloat16
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = "_scales"  # of a moment in float8


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW whose moments are kept in `moments_dtype`; weights have the dtype that they come in.
    Moments in `torch.float8_e4m3fn` are those of matrices; vectors then have them in float32.

    The draws of a step are a function of the number of the step, of the parameter's place in the
    optimizer, and of which part of it this rank has: training that goes on from a checkpoint draws
    the same, and so do ranks that hold the same part.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        moments_dtype: torch.dtype,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._moments_dtype = moments_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """See `torch.optim.Optimizer`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, place)
                place += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`, which gives all that it loads the dtype of the weights."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            kept = state_dict["state"].get(number, {})
            self.state[parameter].update(
                {name: value.to(parameter.device) for name, value in kept.items() if name != "step"}
            )

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(state, parameter)
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        weight_E, gradient_E = _own_row(parameter), _own_row(parameter.grad)
        moments = [_Moment(state, name) for name in MOMENTS]
        draws = torch.Generator(weight_E.device)
        seed = np.random.SeedSequence([step, place, _part_number(parameter)])
        draws.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        size = moments[0].chunk_size
        for begin in range(0, len(weight_E), size):
            chunk = slice(begin, begin + size)
            _step_(
                weight_E[chunk], gradient_E[chunk], moments, chunk,
                group=group, step=step, draws=draws,
            )  # fmt: skip

    def _begin(self, state: dict[str, Any], parameter: torch.Tensor) -> None:
        state["step"] = torch.tensor(0.0)
        dtype = self._moments_dtype
        in_groups = dtype == torch.float8_e4m3fn and parameter.ndim >= 2
        if dtype == torch.float8_e4m3fn and not in_groups:
            dtype = torch.float32
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=dtype)
            if in_groups:
                state[name + SCALES] = scales_of(parameter)


class _Moment:
    """This rank's part of a moment, as the optimizer keeps it."""

    def __init__(self, state: dict[str, Any], name: str) -> None:
        self._kept_E = _own_row(state[name])
        scales = state.get(name + SCALES)
        self._scales_RG = None if scales is None else own_part(scales).flatten(0, -2)
        self._width = state[name].shape[-1] if scales is not None else 1
        self._is_root = name == "exp_avg_sq"

    @property
    def chunk_size(self) -> int:
        """Elements at a time: `CHUNK`, or the whole rows in that where numbers share scales."""
        return max(1, CHUNK // self._width) * self._width

    def read(self, chunk: slice) -> torch.Tensor:
        """In float32; not the kept tensor itself."""
        if self._scales_RG is None:
            return self._kept_E[chunk].to(torch.float32, copy=True)
        codes_RM = self._kept_E[chunk].view(-1, self._width)
        return unpacked(codes_RM, self._rows(chunk), is_root=self._is_root).flatten()

    def keep(self, chunk: slice, exact_E: torch.Tensor, draws: torch.Generator) -> None:
        """Rounded at random where it is narrower than float32."""
        if self._scales_RG is None:
            _keep_(self._kept_E[chunk], exact_E, draws)
            return
        codes_RM = self._kept_E[chunk].view(-1, self._width)
        exact_RM = exact_E.view(-1, self._width)
        pack_(codes_RM, self._rows(chunk), exact_RM, is_root=self._is_root, draws=draws)

    def _rows(self, chunk: slice) -> torch.Tensor:
        assert self._scales_RG is not None
        return self._scales_RG[chunk.start // self._width : chunk.stop // self._width]


def _step_(
    weight_E: torch.Tensor,
    gradient_E: torch.Tensor,
    moments: Sequence[_Moment],
    chunk: slice,
    *,
    group: dict[str, Any],
    step: int,
    draws: torch.Generator,
) -> None:
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    exact_E, g_E = weight_E.float(), gradient_E.float()
    mean, square = moments
    m_E = mean.read(chunk).lerp_(g_E, 1 - beta1)
    v_E = square.read(chunk).mul_(beta2).addcmul_(g_E, g_E, value=1 - beta2)
    mean.keep(chunk, m_E, draws)
    square.keep(chunk, v_E, draws)
    root_E = v_E.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    stepped_E = (exact_E * (1 - lr * group["weight_decay"])).addcdiv_(
        m_E, root_E, value=-lr / (1 - beta1**step)
    )
    _keep_(weight_E, stepped_E, draws)


def _keep_(kept_E: torch.Tensor, exact_E: torch.Tensor, draws: torch.Generator) -> None:
    """Write float32 values; to bfloat16 rounded to one of its two neighbours, to each the more
    often the nearer it is. What bfloat16 holds exactly, and what is not finite, stays as it is.
    """
    if kept_E.dtype != torch.bfloat16:
        kept_E.copy_(exact_E)
        return
    rounded_E = cut(exact_E, noise_for(exact_E, CUT_BITS, draws), CUT_BITS)
    kept_E.copy_(torch.where(exact_E.isfinite(), rounded_E, exact_E))


def _own_row(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a tensor, as one row (a view)."""
    return own_part(tensor).reshape(-1)


def _part_number(parameter: torch.Tensor) -> int:
    """Which part of a parameter this rank has: the same in all replicas."""
    if not isinstance(parameter, DTensor):
        return 0
    return parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)
