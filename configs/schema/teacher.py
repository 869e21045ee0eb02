"""How the teacher is run."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, ChatTemplate, Dtype, TeacherModel
from configs.schema.signals import SignalKind


class _Teacher(StrictModel):
    """What all teachers have. `RESULT_FIELDS` can change its states, others cannot; `SIGNAL` is the
    kind of what it says.

    `tokens_per_batch` bounds a forward pass, in tokens. `context_length` lowers the model's own;
    longer sequences are refused. `num_ranks` processes run the teacher, or ask for its states, in
    the extract stage, in each of `num_workers` tasks that share its work: with a Prefect task
    runner that spans machines, and a store that they share, on as many machines.
    """

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()
    SIGNAL: ClassVar[SignalKind] = "hidden"

    model: TeacherModel
    chat_template: ChatTemplate = Field(default_factory=ChatTemplate)
    dtype: Dtype = "bfloat16"
    tokens_per_batch: int = Field(default=8192, gt=0, le=MOST)
    context_length: int | None = Field(default=None, gt=1, le=MOST)
    num_ranks: int = Field(default=1, gt=0, le=MOST_RANKS)
    num_workers: int = Field(default=1, gt=0, le=MOST_RANKS)

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return 1


class InProcessTeacher(_Teacher):
    """A teacher inside our own processes; in a live or on-policy run, these are the training ranks.

    There, `sleep` moves its weights to host memory while the student trains, and `forward_batches`
    global batches are scored at a time: by default one, on-policy all of a round, whose states then
    wait for the loss on the device.
    """

    sleep: bool = False
    forward_batches: int | None = Field(default=None, gt=0, le=MOST)


class TransformersTeacher(InProcessTeacher):
    """The teacher, run by Hugging Face transformers: the reference, on any device.

    Here `tokens_per_batch` bounds the padded area.
    """

    RESULT_FIELDS = frozenset({"type", "dtype", "attention"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"


class SglangTeacher(InProcessTeacher):
    """The teacher, run by SGLang inside our processes, prefill only.

    One copy is spread over `pipeline_parallel` stages of `tensor_parallel` ranks; on GPUs, the
    experts over `expert_parallel` ranks of a stage. `quantization` and `attention_backend` are
    SGLang's names; by default SGLang chooses. `memory_fraction` of the device is for weights and
    cache. With `deterministic`, a sequence's states do not depend on the batch it is in.
    """

    RESULT_FIELDS = frozenset(
        {"type", "dtype", "quantization", "attention_backend", "deterministic"}
    )

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    expert_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    pipeline_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    quantization: str | None = None
    attention_backend: str | None = None
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    deterministic: bool = False

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _ranks_fit(self) -> "SglangTeacher":
        if self.tensor_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} does not divide "
                f"tensor_parallel={self.tensor_parallel}, whose ranks share the experts"
            )
        if self.num_ranks % self.ranks_per_replica:
            raise ValueError(
                f"num_ranks={self.num_ranks} is not a multiple of tensor_parallel="
                f"{self.tensor_parallel} x pipeline_parallel={self.pipeline_parallel}, the ranks "
                "of one copy of the teacher"
            )
        return self


class SglangServerTeacher(_Teacher):
    """The teacher, run by an SGLang server that you have started, at `url`. Slow: its states come
    over HTTP, as text.

    `model` is the served model's files, for its head and tokenizer; `dtype` is the server's.
    `tokens_per_batch` bounds a request, which may take `timeout_s` seconds.
    """

    RESULT_FIELDS = frozenset({"type", "dtype"})

    type: Literal["sglang_server"] = "sglang_server"
    tokens_per_batch: int = Field(default=2048, gt=0, le=MOST)
    url: str = Field(pattern=r"^https?://")
    timeout_s: float = Field(default=600, gt=0)


Teacher = Annotated[
    TransformersTeacher | SglangTeacher | SglangServerTeacher, Field(discriminator="type")
]
