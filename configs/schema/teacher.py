"""How the teacher is run."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.models import Attention, ChatTemplate, Dtype, TeacherModel
from configs.schema.signals import SignalKind


class _Teacher(StrictModel):
    """What all teachers have. `RESULT_FIELDS` can change its states, others cannot; `SIGNAL` is the
    kind of signal it gives.
    """

    RESULT_FIELDS: ClassVar[frozenset[str]] = frozenset()
    SIGNAL: ClassVar[SignalKind] = "hidden"

    model: TeacherModel
    """The teacher's weights and tokenizer: a folder or hub name, or a GGUF file."""
    chat_template: ChatTemplate = Field(default_factory=ChatTemplate)
    """How conversations are rendered for the teacher: `template` (Jinja text, or the name of one of
    several), its `args`, and the `date` that stands for today.
    """
    dtype: Dtype = "bfloat16"
    """The dtype of weights and computation."""
    tokens_per_batch: int = Field(default=8192, gt=0, le=MOST)
    """The tokens of one forward pass; lower it when memory runs out."""
    context_length: int | None = Field(default=None, gt=1, le=MOST)
    """Lowers the model's own context length; longer sequences are refused."""
    num_ranks: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Processes that run the teacher in the extract stage, in each of `num_workers` tasks."""
    num_workers: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Tasks that share the extraction; more than 1 with a Prefect task runner that spans machines
    and a store that these share.
    """

    @property
    def ranks_per_replica(self) -> int:
        """Processes that one copy of the model is spread over."""
        return 1


class InProcessTeacher(_Teacher):
    """A teacher inside our own processes; in a live or on-policy run, in the training ranks."""

    sleep: bool = False
    """In a live or on-policy run: wait in host memory while the student trains."""
    forward_batches: int | None = Field(default=None, gt=0, le=MOST)
    """In a live or on-policy run: so many global batches are scored at a time; by default one,
    on-policy a whole round, whose states wait for the loss on the device.
    """


class TransformersTeacher(InProcessTeacher):
    """The teacher, run by Hugging Face transformers: the reference, on any device. Its sequences
    stand behind one another where that is exact (see `student.packing`); where they do not,
    `tokens_per_batch` bounds the padded area.
    """

    RESULT_FIELDS = frozenset({"type", "dtype", "attention"})

    type: Literal["transformers"] = "transformers"
    attention: Attention = "sdpa"
    """The implementation of attention."""


class SglangTeacher(InProcessTeacher):
    """The teacher, run by SGLang inside our processes, prefill only."""

    RESULT_FIELDS = frozenset(
        {"type", "dtype", "quantization", "attention_backend", "deterministic"}
    )

    type: Literal["sglang"] = "sglang"
    tensor_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Ranks that share a pipeline stage of one copy of the teacher."""
    expert_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Ranks of a stage that its experts are spread over, on GPUs."""
    pipeline_parallel: int = Field(default=1, gt=0, le=MOST_RANKS)
    """Stages that one copy of the teacher is spread over."""
    quantization: str | None = None
    """SGLang's name of a quantization."""
    attention_backend: str | None = None
    """SGLang's name of a kind of attention; by default SGLang chooses."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """The share of the device's free memory for weights and cache; by default all but what the
    activations of a batch take.
    """
    deterministic: bool = False
    """A sequence's states do not depend on the batch it is in. Not on the GPUs that train, where it
    would change the student's arithmetic too.
    """

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
    """The teacher, run by an SGLang server that you have started. Slow: its states come over HTTP,
    as text. `model` is the served model's files, for its head and tokenizer; `dtype` is the
    server's.
    """

    RESULT_FIELDS = frozenset({"type", "dtype"})

    type: Literal["sglang_server"] = "sglang_server"
    tokens_per_batch: int = Field(default=2048, gt=0, le=MOST)
    """The tokens of one request."""
    url: str = Field(pattern=r"^https?://")
    """Where the server answers."""
    timeout_s: float = Field(default=600, gt=0)
    """How long a request may take, in seconds."""


Teacher = Annotated[
    TransformersTeacher | SglangTeacher | SglangServerTeacher, Field(discriminator="type")
]
