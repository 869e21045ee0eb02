"""The student and how it is trained."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, ChatTemplate, Dtype, StudentModel

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(StrictModel):
    """Low-rank adapters (arXiv 2106.09685) of `rank`, scaled by `alpha` / `rank`, on the linear
    layers whose names end in one of `targets`; without these, on all but the output head. The
    trained student has them merged.
    """

    rank: int = Field(default=16, gt=0, le=MOST)
    alpha: int = Field(default=32, gt=0, le=MOST)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)

    @property
    def scale(self) -> float:
        """What a product of adapters is multiplied by."""
        return self.alpha / self.rank


class StudentConfig(StrictModel):
    """The student and its optimization.

    `global_batch_size` counts sequences per optimizer step over all ranks; `micro_batch_tokens`
    bounds the padded area of one forward pass of one rank. Weights and optimizer states are
    float32; `compute_dtype` is what the layers compute in. Train for `epochs`, or for `max_steps`;
    on-policy, the rounds say how long.
    An epoch is shuffled as a whole, or with `shuffle_window_shards` within so many shards of the
    stored states at a time: for a store that is larger than memory or far away. With
    `vocabulary_parallel`, no rank holds the whole output heads: each has a part of the vocabulary,
    and makes the logits of all ranks' tokens for it. With `sleep`, weights and optimizer states of
    an on-policy run wait in host memory while it rolls out and scores. With `lora`, low-rank
    adapters train instead of the weights.
    """

    model: StudentModel
    lora: LoraConfig | None = None
    chat_template: ChatTemplate = Field(default_factory=ChatTemplate)
    compute_dtype: Dtype = "bfloat16"
    save_dtype: Dtype = "bfloat16"
    attention: Attention = "sdpa"
    activation_checkpointing: bool = False
    lr: float = Field(default=2e-5, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: int | None = Field(default=None, gt=0, le=MOST)
    max_steps: int | None = Field(default=None, gt=0, le=MOST)
    global_batch_size: int = Field(default=64, gt=0, le=MOST)
    shuffle_window_shards: int | None = Field(default=None, gt=0, le=MOST)
    micro_batch_tokens: int = Field(default=8192, gt=0, le=MOST)
    num_ranks: int = Field(default=1, gt=0, le=MOST_RANKS)
    vocabulary_parallel: bool = False
    sleep: bool = False
    checkpoint_every: int = Field(default=100, gt=0, le=MOST)
    keep_checkpoints: int = Field(default=2, gt=0, le=MOST)

    @model_validator(mode="after")
    def _ranks_have_work(self) -> "StudentConfig":
        if self.global_batch_size < self.num_ranks:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} sequences are fewer than num_ranks="
                f"{self.num_ranks}, and a rank without any waits for the others; raise the one or "
                "lower the other"
            )
        return self
