"""The student's optimizers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from configs.schema.student import AdamWConfig, MuonConfig, ParameterGroup, StudentConfig
from kdflow_core.models.loading import DTYPES
from kdflow_core.models.structure import decoder_layers, named_groups
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.narrow_adamw import NarrowAdamW

Named = dict[str, torch.nn.Parameter]
MOMENTS_DTYPES = DTYPES | {"float8": torch.float8_e4m3fn}


def freeze_(model: torch.nn.Module, config: StudentConfig) -> None:
    """Take what is frozen out of training. Raises ModelError for groups that do not fit."""
    for group, named in _grouped(dict(model.named_parameters()), config):
        if group is not None and group.frozen:
            for parameter in named.values():
                parameter.requires_grad = False


def hold_(
    parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype, *, filled: bool = True
) -> None:
    """Hold parameters in `dtype`. What is not yet `filled` has no values, and takes no memory here
    either.
    """
    for parameter in parameters:
        if parameter.dtype != dtype:
            held = parameter.data
            parameter.data = held.to(dtype) if filled else torch.empty_like(held, dtype=dtype)


class Optimizers:
    """Optimizers of different parameters, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def states(self) -> Iterator[dict[str, Any]]:
        """What they keep of each parameter."""
        for part in self.parts:
            yield from part.state.values()

    def step(self) -> None:
        """A step of all of them."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def build_optimizers(module: DistillationModule, config: StudentConfig) -> Optimizers:
    """The config's optimizer on what trains, by its groups; where these say nothing, weight decay
    acts on matrices only, not on norms and biases. What an algorithm has of its own is in no group,
    and has the algorithm's rate. The rates of the groups are their peaks.
    """
    groups = _groups(module, config)
    if not isinstance(config.optimizer, MuonConfig):
        return Optimizers([_adamw(groups, config)])
    inner = {id(p) for p in decoder_layers(module.model).parameters() if p.ndim == 2}

    def part(of_muon: bool) -> list[dict[str, Any]]:
        chosen = [
            group | {"params": [p for p in group["params"] if (id(p) in inner) == of_muon]}
            for group in groups
        ]
        return [group for group in chosen if group["params"]]

    parts: list[torch.optim.Optimizer] = []
    if matrices := part(True):
        momentum = config.optimizer.momentum
        parts.append(
            torch.optim.Muon(
                matrices, lr=config.lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
            )
        )
    if rest := part(False):
        parts.append(_adamw(rest, config))
    return Optimizers(parts)


def _adamw(groups: list[dict[str, Any]], config: StudentConfig) -> torch.optim.Optimizer:
    """On weights and with moments in float32 torch's, which is the fastest."""
    moments = config.optimizer.moments_dtype if isinstance(config.optimizer, AdamWConfig) else None
    if config.weights_dtype == "float32" and moments in (None, "float32"):
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.adam_betas, fused=True)
    return NarrowAdamW(
        groups,
        lr=config.lr,
        betas=config.adam_betas,
        moments_dtype=MOMENTS_DTYPES[moments or "float32"],
    )


def _groups(module: DistillationModule, config: StudentConfig) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []

    def add(
        parameters: Iterable[torch.nn.Parameter], lr: float | None, decay: float | None = None
    ) -> None:
        training = [p for p in parameters if p.requires_grad]
        for matrices in (True, False):
            usual = config.weight_decay if matrices else 0.0
            groups.append(
                {
                    "params": [p for p in training if (p.ndim >= 2) == matrices],
                    "weight_decay": usual if decay is None else decay,
                    "lr": config.lr if lr is None else lr,
                }
            )

    for group, named in _grouped(dict(module.model.named_parameters()), config):
        if group is None:
            add(named.values(), None)
        else:
            add(named.values(), group.lr, group.weight_decay)
    add(module.algorithm.parameters(), module.algorithm.lr)
    return [group for group in groups if group["params"]]


def _grouped(
    parameters: Named, config: StudentConfig
) -> Iterator[tuple[ParameterGroup | None, Named]]:
    """Each group with its parameters, and the rest of them."""
    groups = config.parameter_groups
    chosen = named_groups(parameters, groups)
    left = parameters.keys() - {name for names in chosen for name in names}
    yield None, {name: p for name, p in parameters.items() if name in left}
    for group, names in zip(groups, chosen, strict=True):
        yield group, {name: parameters[name] for name in names}
