"""The trained student as a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedTokenizerBase

from kdflow_core.models.saving import save_model_folder
from kdflow_core.student.lora import merged_state
from kdflow_core.student.module import DistillationModule


def export_student(
    module: DistillationModule,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    model_card: str,
    target: Path,
    lora_scale: float = 1.0,
) -> None:
    """Gather the weights on rank 0, with adapters merged, and write them with tokenizer, chat
    template, generation config and model card. Collective: every rank must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    if dist.get_rank() == 0:
        own = {
            name.removeprefix("model."): tensor
            for name, tensor in state.items()
            if name.startswith("model.")  # and not what the algorithm has of its own
        }
        save_model_folder(
            config=module.model.config,
            state_dict=merged_state(own, lora_scale),
            dtype=dtype,
            generation_config=module.model.generation_config,
            target=target,
        )
        tokenizer.save_pretrained(target)
        (target / "README.md").write_text(model_card, encoding="utf-8")
    dist.barrier()
