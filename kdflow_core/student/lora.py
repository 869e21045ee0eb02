"""Low-rank adapters (LoRA, arXiv 2106.09685, equation 3): they train, the model's weights do not.

PEFT puts them into the model in place; outside, the model has its own names and merged weights:
W + alpha / rank * B A.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from configs.schema.student import LoraConfig
from kdflow_core.models.structure import adapter_targets, decoder_layers, layers_prefix

ADAPTER = "default"
NOT_READ = (
    "The adapters of this student are not here: PEFT would put them elsewhere, on its experts for\n"
    "the layers beside these. The model in the folder `model` has them merged.\n"
)


@dataclass(frozen=True, kw_only=True)
class ServedWeight:
    """A weight as the model is served and saved: the parameter it is, and its adapter's, if any."""

    parameter: str
    a: str | None = None
    b: str | None = None
    scale: float = 1.0

    def value(self, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The weight, from its parameters; with an adapter in float32."""
        weight = get(self.parameter)
        if self.a is None or self.b is None:
            return weight
        merged: torch.Tensor = torch.addmm(
            weight.float(), get(self.b).float(), get(self.a).float(), alpha=self.scale
        )
        return merged


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze a model and give linear layers of its decoder adapters.

    Raises ModelError for targets that are something else.
    """
    prefix = layers_prefix(model)
    targets = [name.removeprefix(prefix) for name in adapter_targets(model, config.targets)]
    # Given the layers alone, PEFT does not know whose they are: of some mixtures of experts it
    # takes the layers that all tokens pass for the experts, which then get the adapters.
    layers = decoder_layers(model)
    inject_adapter_in_model(_peft_config(config, targets), layers, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _peft_config(config: LoraConfig, targets: list[str]) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def save_adapter(
    state: Mapping[str, torch.Tensor], config: LoraConfig, target: Path, model: PreTrainedModel
) -> None:
    """Write the adapters of a state dict as PEFT reads them, for the model they were trained on; in
    their place a note, where PEFT would take them for others.
    """
    mark = ".lora_A."
    targets = [name.partition(mark)[0] for name in state if mark in name]
    target.mkdir(parents=True, exist_ok=True)
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    # As PEFT does before it reads.
    read = _peft_config(config, targets)
    convert_peft_config_for_transformers(read, model, None)
    named = convert_peft_adapter_state_dict_for_transformers(model, read, adapters)
    if set(read.target_modules or ()) != set(targets) or named.keys() != adapters.keys():
        (target / "README.md").write_text(NOT_READ, encoding="utf-8")
        return
    _peft_config(config, targets).save_pretrained(str(target))
    save_file(adapters, target / "adapter_model.safetensors", metadata={"format": "pt"})


def served_weights(names: Mapping[str, object], scale: float) -> dict[str, ServedWeight]:
    """The served weights by name, from the names of a model's parameters; `scale` is alpha/rank."""
    served = {}
    for name in names:
        if ".lora_" in name:
            continue
        outer = name.replace(".base_layer.", ".")
        layer, _, kind = name.rpartition(".base_layer.")
        a, b = (f"{layer}.lora_{part}.{ADAPTER}.weight" for part in "AB")
        if kind == "weight" and a in names:
            served[outer] = ServedWeight(parameter=name, a=a, b=b, scale=scale)
        else:
            served[outer] = ServedWeight(parameter=name)
    return served
