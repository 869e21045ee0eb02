"""AdamW (arXiv 1711.05101) on weights, or with moments, in bfloat16.

A usual step of a weight is less than half of what lies between two neighbours in bfloat16, and
would be rounded away every time. Steps are computed in float32, and what is kept in bfloat16 is
rounded up or down at random, so that it is right on average (stochastic rounding: arXiv 2010.06192,
section 3.1).

Dimensions: E elements of this rank's part of a parameter, some at a time.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from kdflow_core.models.partial_loading import own_part

CHUNK = 1 << 22  # elements at a time, each of which takes about 40 bytes meanwhile
CUT_BITS = 16  # float32 has so many more than bfloat16


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW whose moments are kept in `moments_dtype`; weights have the dtype that they come in.

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

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self._moments_dtype)
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        weight_E, gradient_E = _own_row(parameter), _own_row(parameter.grad)
        mean_E, square_E = _own_row(state["exp_avg"]), _own_row(state["exp_avg_sq"])
        draws = torch.Generator(weight_E.device)
        seed = np.random.SeedSequence([step, place, _part_number(parameter)])
        draws.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        for begin in range(0, len(weight_E), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            _step_(
                weight_E[chunk], gradient_E[chunk], mean_E[chunk], square_E[chunk],
                group=group, step=step, draws=draws,
            )  # fmt: skip


def _step_(
    weight_E: torch.Tensor,
    gradient_E: torch.Tensor,
    mean_E: torch.Tensor,
    square_E: torch.Tensor,
    *,
    group: dict[str, Any],
    step: int,
    draws: torch.Generator,
) -> None:
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    exact_E, g_E = weight_E.float(), gradient_E.float()
    m_E = mean_E.float().lerp(g_E, 1 - beta1)
    v_E = (square_E.float() * beta2).addcmul_(g_E, g_E, value=1 - beta2)
    _keep_(mean_E, m_E, draws)
    _keep_(square_E, v_E, draws)
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
    bits_E = exact_E.view(torch.int32)
    noise_E = torch.empty_like(bits_E).random_(0, 1 << CUT_BITS, generator=draws)
    # Cut off, after so much was added that the cut carries over as often as it should.
    rounded_E = (bits_E + noise_E).bitwise_and_(-(1 << CUT_BITS)).view(torch.float32)
    kept_E.copy_(torch.where(exact_E.isfinite(), rounded_E, exact_E))


def _own_row(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a tensor, as one row (a view)."""
    return own_part(tensor).reshape(-1)


def _part_number(parameter: torch.Tensor) -> int:
    """Which part of a parameter this rank has: the same in all replicas."""
    if not isinstance(parameter, DTensor):
        return 0
    return parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)
