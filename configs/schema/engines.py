"""Engines in which a model writes answers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, Dtype


class _Engine(StrictModel):
    """What all of them have. `RESULT_FIELDS` can change the answers, others cannot."""

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()

    dtype: Dtype = "bfloat16"
    """The dtype of weights and computation."""

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return 1


class TransformersEngine(_Engine):
    """Hugging Face transformers: the reference."""

    RESULT_FIELDS = frozenset({"type", "dtype", "attention", "prompts_per_batch"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"
    """The implementation of attention."""
    prompts_per_batch: int = Field(default=32, gt=0, le=MOST)
    """Prompts that are answered together."""


class SglangEngine(_Engine):
    """SGLang's engine with continuous batching, in processes of its own."""

    RESULT_FIELDS = frozenset({"type", "dtype"})

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Ranks that one copy of the model is spread over."""
    first_gpu: int = Field(default=0, ge=0, le=MOST_RANKS)
    """The first GPU of the first copy."""
    max_running: int | None = Field(default=None, gt=0, le=MOST)
    """Answers that are written at a time, at most."""
    cache_tokens: int | None = Field(default=None, gt=0, le=MOST)
    """Tokens in the cache; by default what fits `memory_fraction`."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """The share of the device for weights and cache; by default SGLang chooses."""
    attention_backend: str | None = None
    """SGLang's name of a kind of attention; by default SGLang chooses."""

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_parallel


Engine = Annotated[TransformersEngine | SglangEngine, Field(discriminator="type")]
