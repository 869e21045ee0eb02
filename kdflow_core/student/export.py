"""The trained student as a plain Hugging Face folder."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from configs.schema.student import LoraConfig
from kdflow_core.data.chat import ChatFormat
from kdflow_core.models.saving import WeightFiles, save_description, saved_buffers
from kdflow_core.student.lora import save_adapter
from kdflow_core.student.module import DistillationModule
from kdflow_core.student.publish import WeightPublisher, gathered

FILE_BYTES = 10**9


def export_student(
    module: DistillationModule,
    *,
    chat: ChatFormat,
    dtype: torch.dtype,
    model_card: str,
    target: Path,
    lora: LoraConfig | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the weights, with adapters merged, with the tokenizer, the chat template and the ends
    of turns that the student was trained with, generation config and model card; adapters also by
    themselves, in `adapter` beside `target`. Rank 0 writes, a file of `file_bytes` at a time, and
    holds no more of the model. Collective: every rank must call it.
    """
    module.release()
    model, first = module.model, dist.get_rank() == 0
    weights = WeightPublisher(
        model,
        dtype=dtype,
        bucket_bytes=file_bytes,
        checkpoint_names=True,
        lora_scale=1.0 if lora is None else lora.scale,
    )
    if lora is not None:
        adapters = _adapters(model)
        if first:
            save_adapter(adapters, lora, target.parent / "adapter", model)
    if first:
        config, generation = model.config, model.generation_config
        ends: int | list[int] = list(chat.end_ids)
        if chat.end_ids:
            ends = chat.end_ids[0] if len(chat.end_ids) == 1 else ends
            config.eos_token_id = generation.eos_token_id = ends
        save_description(model, dtype=dtype, target=target)
    files = WeightFiles(target, weights.num_buckets)
    buffers = {
        name: buffer.to(dtype) if buffer.is_floating_point() else buffer
        for name, buffer in saved_buffers(model).items()
    }
    for number in range(weights.num_buckets):
        tensors = dict(weights.gather(number))
        if first:
            last = number == weights.num_buckets - 1
            files.write(tensors | buffers if last else tensors)
    if first:
        chat.tokenizer_as_used().save_pretrained(target)
        (target / "README.md").write_text(model_card, encoding="utf-8")
    dist.barrier()


@torch.no_grad()
def _adapters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapters' weights, whole, on every rank."""
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if ".lora_" in name]
    return {name: gathered(parameters, torch.float32, name).cpu() for name in names}
