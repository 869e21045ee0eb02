"""How the student answers prompts between two rounds of training."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.schema.base import StrictModel
from configs.schema.models import Attention, Dtype


class _Rollout(StrictModel):
    """What all rollout engines have. `RESULT_FIELDS` can change the answers, others cannot.

    `bucket_mb` of new weights are handed over at a time, twice that are held.
    """

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()

    dtype: Dtype = "bfloat16"
    bucket_mb: int = Field(default=256, gt=0)


class TransformersRollout(_Rollout):
    """Hugging Face transformers, `prompts_per_batch` prompts at a time: the reference."""

    RESULT_FIELDS = frozenset({"type", "dtype", "attention", "prompts_per_batch"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"
    prompts_per_batch: int = Field(default=32, gt=0)


class SglangRollout(_Rollout):
    """SGLang's engine with continuous batching, in processes of its own.

    One copy is spread over `tensor_parallel` ranks, on GPUs from `first_gpu` on; with `max_running`
    answers at a time and `cache_tokens` tokens in its cache, or what SGLang chooses to fit
    `memory_fraction` of the device. With `sleep`, it leaves GPUs to teacher and student while they
    work. New weights come through shared memory (`weights: tensor`), which also serves an engine on
    the student's own GPU, or by `broadcast` over NCCL or Gloo.
    """

    RESULT_FIELDS = frozenset({"type", "dtype"})

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0)
    first_gpu: int = Field(default=0, ge=0)
    max_running: int | None = Field(default=None, gt=0)
    cache_tokens: int | None = Field(default=None, gt=0)
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    attention_backend: str | None = None
    weights: Literal["tensor", "broadcast"] = "tensor"
    sleep: bool = False


Rollout = Annotated[TransformersRollout | SglangRollout, Field(discriminator="type")]
