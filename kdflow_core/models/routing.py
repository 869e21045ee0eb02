"""The routers of mixtures of experts: what they make of each token, and how even that is.

Dimensions: S tokens in layers (each token once for every layer with experts), E experts, K experts
that a token goes to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from kdflow_core.errors import ModelError

LOGITS = "router_logits"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a model routes, and the `weight` of its balance in the loss."""

    num_experts: int
    num_chosen: int
    weight: float


def routing_of(
    model: PreTrainedModel, weight: float | None, *, compiled: bool = False
) -> Routing | None:
    """How a model routes, where its balance is to have a `weight` (None: that of the model's own
    config, if there is one); None where there is nothing to weigh. Raises ModelError.
    """
    routed: Any = model
    own = getattr(model, "router_aux_loss_coef", None)
    if own is None or next(routers(model), None) is None:
        if weight:
            raise ModelError(
                f"student.router_aux_loss_coef={weight}: {type(model).__name__} has no routers "
                "whose balance is known; leave it out"
            )
        return None
    weight = float(own if weight is None else weight)
    if not weight:
        return None
    if compiled:
        raise ModelError(
            f"student.compile: what the routers of {type(model).__name__} say cannot be had from "
            "compiled layers; set student.router_aux_loss_coef=0, or turn compile off"
        )
    return Routing(
        num_experts=routed.num_experts, num_chosen=routed.num_experts_per_tok, weight=weight
    )


def routers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The modules that give the logits of `balance`, where they do nothing else."""
    recorder = _recorder(model)
    if isinstance(recorder, OutputRecorder) and recorder.index == 0:
        for name, module in model.named_modules():
            told_apart = recorder.layer_name is None or recorder.layer_name in name
            if isinstance(module, recorder.target_class) and told_apart:
                yield module


def _recorder(model: PreTrainedModel) -> Any:
    """What transformers records as the logits of a model's routers; None where there are none."""
    base: Any = model.base_model
    return (base._can_record_outputs or {}).get(LOGITS)


def balance(logits_of_layers: Sequence[torch.Tensor], routing: Routing) -> torch.Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6) as
    transformers has it, for all layers together: 1 for each expert that a token goes to, where all
    experts have as much of it. It has a gradient by the routers' probabilities.
    """
    probability_SE = torch.cat(list(logits_of_layers)).float().softmax(-1)
    chosen_SK = probability_SE.topk(routing.num_chosen).indices
    chosen = chosen_SK.flatten()
    share_E = probability_SE.new_zeros(routing.num_experts)
    share_E.index_add_(0, chosen, torch.ones_like(chosen, dtype=share_E.dtype))
    return routing.num_experts * (share_E / len(probability_SE) * probability_SE.mean(0)).sum()
