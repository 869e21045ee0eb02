"""The trained student as a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from configs.schema.student import LoraConfig
from kdflow_core.data.chat import ChatFormat
from kdflow_core.models.saving import save_model_folder
from kdflow_core.student.lora import merged_state, save_adapter
from kdflow_core.student.module import DistillationModule


def export_student(
    module: DistillationModule,
    *,
    chat: ChatFormat,
    dtype: torch.dtype,
    model_card: str,
    target: Path,
    lora: LoraConfig | None = None,
) -> None:
    """Gather the weights on rank 0, with adapters merged, and write them with the tokenizer, the
    chat template and the ends of turns that the student was trained with, generation config and
    model card; adapters also by themselves, in `adapter` beside `target`. Collective: every rank
    must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    if dist.get_rank() == 0:
        own = {
            name.removeprefix("model."): tensor
            for name, tensor in state.items()
            if name.startswith("model.")  # and not what the algorithm has of its own
        }
        if lora is not None:
            save_adapter(own, lora, target.parent / "adapter")
        config, generation = module.model.config, module.model.generation_config
        ends: int | list[int] = list(chat.end_ids)
        if chat.end_ids:
            ends = chat.end_ids[0] if len(chat.end_ids) == 1 else ends
            config.eos_token_id = generation.eos_token_id = ends
        save_model_folder(
            config=config,
            state_dict=merged_state(own, 1.0 if lora is None else lora.scale),
            dtype=dtype,
            generation_config=generation,
            target=target,
        )
        chat.tokenizer_as_used().save_pretrained(target)
        (target / "README.md").write_text(model_card, encoding="utf-8")
    dist.barrier()
