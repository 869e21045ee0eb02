"""The student's optimizer."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from configs.schema.student import ParameterGroup, StudentConfig
from kdflow_core.models.structure import named_groups
from kdflow_core.student.module import DistillationModule

Named = dict[str, torch.nn.Parameter]


def freeze_(model: torch.nn.Module, config: StudentConfig) -> None:
    """Take what is frozen out of training. Raises ModelError for groups that do not fit."""
    for group, named in _grouped(dict(model.named_parameters()), config):
        if group is not None and group.frozen:
            for parameter in named.values():
                parameter.requires_grad = False


def build_optimizer(module: DistillationModule, config: StudentConfig) -> torch.optim.AdamW:
    """AdamW on what trains, by its groups; where these say nothing, weight decay acts on matrices
    only, not on norms and biases. What an algorithm has of its own is in no group, and has
    the algorithm's rate. The rates of the groups are their peaks.
    """
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
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=config.adam_betas, fused=True)


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
