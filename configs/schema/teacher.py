"""How the teacher is run."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.schema.base import StrictModel
from configs.schema.models import Attention, ChatTemplate, Dtype, TeacherModel


class _InProcessTeacher(StrictModel):
    """A teacher inside our own processes. `RESULT_FIELDS` can change its states, others cannot.

    `tokens_per_batch` bounds a forward pass, in tokens. `context_length` lowers the model's own;
    longer sequences are refused. `num_ranks` processes run the teacher in
    the extract stage; in a live run the training ranks do. There, `sleep` moves its weights to host
    memory while the student trains, and `forward_batches` global batches are scored at a time.
    """

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()

    model: TeacherModel
    chat_template: ChatTemplate = Field(default_factory=ChatTemplate)
    dtype: Dtype = "bfloat16"
    tokens_per_batch: int = Field(default=8192, gt=0)
    context_length: int | None = Field(default=None, gt=1)
    num_ranks: int = Field(default=1, gt=0)
    sleep: bool = False
    forward_batches: int = Field(default=1, gt=0)

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return 1


class TransformersTeacher(_InProcessTeacher):
    """The teacher, run by Hugging Face transformers: the reference, on any device.

    Here `tokens_per_batch` bounds the padded area.
    """

    RESULT_FIELDS = frozenset({"type", "dtype", "attention"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"


class SglangTeacher(_InProcessTeacher):
    """The teacher, run by SGLang inside our processes, prefill only.

    One copy is spread over `tensor_parallel` ranks, the experts over `expert_parallel` of them.
    `quantization` and `attention_backend` are SGLang's names; by default SGLang chooses.
    `memory_fraction` of the device is for weights and cache. With `deterministic`, a sequence's
    states do not depend on the batch it is in.
    """

    RESULT_FIELDS = frozenset(
        {"type", "dtype", "quantization", "attention_backend", "deterministic"}
    )

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0)
    expert_parallel: int = Field(default=1, gt=0)
    quantization: str | None = None
    attention_backend: str | None = None
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    deterministic: bool = False

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_parallel

    @model_validator(mode="after")
    def _ranks_fit(self) -> "SglangTeacher":
        if self.tensor_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} does not divide "
                f"tensor_parallel={self.tensor_parallel}, whose ranks share the experts"
            )
        if self.num_ranks % self.tensor_parallel:
            raise ValueError(
                f"num_ranks={self.num_ranks} is not a multiple of "
                f"tensor_parallel={self.tensor_parallel}, the ranks of one copy of the teacher"
            )
        return self


Teacher = Annotated[TransformersTeacher | SglangTeacher, Field(discriminator="type")]
