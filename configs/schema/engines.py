"""Engines in which a model writes answers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, Dtype


class _Engine(StrictModel):
    """What all of them have. `RESULT_FIELDS` can change the answers, others cannot."""

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()

    dtype: Dtype = "bfloat16"

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return 1


class TransformersEngine(_Engine):
    """Hugging Face transformers, `prompts_per_batch` prompts at a time: the reference."""

    RESULT_FIELDS = frozenset({"type", "dtype", "attention", "prompts_per_batch"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"
    prompts_per_batch: int = Field(default=32, gt=0, le=MOST)


class SglangEngine(_Engine):
    """SGLang's engine with continuous batching, in processes of its own.

    One copy is spread over `tensor_parallel` ranks, on GPUs from `first_gpu` on; with `max_running`
    answers at a time and `cache_tokens` tokens in its cache, or what SGLang chooses to fit
    `memory_fraction` of the device.
    """

    RESULT_FIELDS = frozenset({"type", "dtype"})

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    first_gpu: int = Field(default=0, ge=0, le=MOST_RANKS)
    max_running: int | None = Field(default=None, gt=0, le=MOST)
    cache_tokens: int | None = Field(default=None, gt=0, le=MOST)
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    attention_backend: str | None = None

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_parallel


Engine = Annotated[TransformersEngine | SglangEngine, Field(discriminator="type")]
