"""The root of the config: one run of the flow `kd`."""

from typing import Literal

from pydantic import Field, model_validator

from configs.schema.algorithm import (
    Algorithm,
    MultiTeacherConfig,
    VanillaKDConfig,
    check_loss,
    check_signal,
    check_teachers,
)
from configs.schema.alignment import AlignmentMode, check_aligned
from configs.schema.base import MOST, SEEDS, PathText, StrictModel
from configs.schema.data import DataConfig
from configs.schema.eval import EvalConfig
from configs.schema.loss import LossConfig
from configs.schema.models import NewVocabularyModel
from configs.schema.on_policy import OnPolicyConfig, check_on_policy, check_samples
from configs.schema.student import StudentConfig
from configs.schema.teacher import InProcessTeacher, Teacher
from configs.schema.workers import LocalWorkers, RayWorkers, Workers, check_over_nodes

DEFAULT_POOL = "default"
# Fields that name a Python function.
REWARD, VERIFIER = "on_policy.reward.function", "eval.verifier"


class StorageConfig(StrictModel):
    """Where artifacts, checkpoints and copies are kept."""

    root: PathText = ".kdflow/store"
    """Where finished artifacts are kept: a folder, or an fsspec URL such as `s3://bucket/kdflow`
    (`pip install s3fs`). States need 2 bytes x hidden size per supervised token. Relative paths
    start at the current directory.
    """
    scratch: PathText = ".kdflow/scratch"
    """A folder of this machine for checkpoints and for copies of remote artifacts."""
    checkpoints: Literal["scratch", "store"] = "scratch"
    """Where checkpoints are kept: in `scratch` alone, or also in the `store`, so that another
    machine goes on where the one that wrote them is lost.
    """
    shard_rows: int | None = Field(default=None, gt=0, le=MOST)
    """Rows of states in a shard; by default derived from the width of a row. Give it together with
    `chunk_rows`.
    """
    chunk_rows: int | None = Field(default=None, gt=0, le=MOST)
    """Rows of states in a chunk, of which a shard has a whole number."""
    codec: Literal["raw", "planes", "int8"] = "raw"
    """How states are stored: `raw` bfloat16 (read without a copy), `planes` (lossless, about 30 %
    smaller) or `int8` (lossy, half the size; the loss is measured and recorded).
    """
    read_cache_gb: float = Field(default=100.0, gt=0)
    """How much of a remote store's shards is kept in `scratch` at most, in GB."""
    check_room: bool = True
    """Whether states that will not fit a local disk are refused before they are computed."""

    @model_validator(mode="after")
    def _local_scratch(self) -> "StorageConfig":
        if "://" in self.scratch:
            raise ValueError(
                "`scratch` is a folder of this machine, for checkpoints and copies; a URL is for "
                "`root`"
            )
        return self

    @model_validator(mode="after")
    def _whole_chunks(self) -> "StorageConfig":
        if (self.shard_rows is None) != (self.chunk_rows is None):
            raise ValueError("give both `shard_rows` and `chunk_rows`, or neither")
        if self.shard_rows and self.chunk_rows and self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"shard_rows={self.shard_rows} is not a multiple of chunk_rows={self.chunk_rows}"
            )
        return self


class TrackingConfig(StrictModel):
    """Where metrics go besides JSON lines."""

    tensorboard: bool = True
    """Whether metrics are also written for TensorBoard."""
    wandb_project: str | None = None
    """A Weights & Biases project that gets the metrics; needs the package `wandb`."""
    mlflow_experiment: str | None = None
    """An MLflow experiment that gets the metrics, at `MLFLOW_TRACKING_URI`; needs the package
    `mlflow-skinny`.
    """
    trackio_project: str | None = None
    """A trackio project that gets the metrics; needs the package `trackio`."""
    prometheus_port: int | None = Field(default=None, gt=0, lt=2**16)
    """A port of the machine that starts the run, where Prometheus finds how far each stage is and
    the last metrics of training.
    """


class PromotionConfig(StrictModel):
    """Which students count as the latest ones of the runs of a name."""

    metric: Literal["forward_kl", "reverse_kl", "cross_entropy", "agreement"] | None = None
    """The held-out figure that must not get worse; by default every student that a run comes to its
    end with counts.
    """
    tolerance: float = Field(default=0.0, ge=0)
    """By how much it may be worse than that of the student that counts now, over the held-out
    samples that both were scored on.
    """


class RunConfig(StrictModel):
    """One complete run.

    On-policy, the teacher runs inside the training ranks, and `delivery` has no effect; nor has it
    for an algorithm that reads no teacher signals in training. Both leave it at its default.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    """The run's name, in reports, logs and `kdflow store ls`."""
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """What every random choice of the run is derived from."""
    mode: Literal["offpolicy", "onpolicy"] = "offpolicy"
    """`offpolicy` trains on given answers; `onpolicy` on what the student samples, in rounds, as
    `on_policy` says.
    """
    data: DataConfig
    """Data sources, their blend, and how conversations become token sequences."""
    delivery: Literal["replay", "live", "auto"] = "replay"
    """`replay` (store the teacher's states, train on them as often as you like), `live` (the
    teacher runs inside the training ranks, only held-out states are stored) or `auto` (a short
    probe decides, given `planned_runs`; states that are stored already are replayed).
    """
    planned_runs: int = Field(default=1, gt=0, le=MOST)
    """How many runs will use the same teacher and data; `delivery: auto` goes by it."""
    workers: Workers = Field(default_factory=LocalWorkers)
    """Where the ranks of a stage are started: on this machine (`{type: local}`), or on those of a
    Ray cluster (`{type: ray}`: `address`, `strategy`, `cpus_per_rank`, `gpus_per_rank`, `env`).
    """
    device_pool: str = Field(default=DEFAULT_POOL, pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=50)
    """A name for the devices that the run uses: of the runs of a pool on one Prefect server, one is
    at work at a time, once `kdflow service init` has created its limit.
    """
    stall_limit_s: float = Field(default=1800, gt=0)
    """After how many seconds without progress a rank ends its stage, which is then tried again."""
    teacher: Teacher
    """The teacher, and what runs it: `type: sglang` (in process; on a GPU after `pip install -e
    '.[sglang]'`, on a CPU as installed), `transformers` (the reference), or `sglang_server` (a
    server that you run, at `url`; slow: states come over HTTP as text).
    """
    student: StudentConfig
    """The student, and how it is trained."""
    algorithm: Algorithm = Field(default_factory=VanillaKDConfig)
    """From whom the student learns, on which tokens: `vanilla_kd` (default), `sft`, `dual_space`,
    `gold`, `multi_teacher` or `self_distillation`.
    """
    loss: LossConfig = Field(default_factory=LossConfig)
    """The divergence, and how it mixes with cross-entropy."""
    alignment: AlignmentMode = "auto"
    """How the teacher's tokens stand to the student's: `exact` (both have one vocabulary; others
    are refused), `bytes` (by the bytes of their tokens, whatever both tokenizers are), or `auto`:
    `exact` where it can be, else `bytes`.
    """
    on_policy: OnPolicyConfig | None = None
    """The rounds of an on-policy run."""
    storage: StorageConfig = Field(default_factory=StorageConfig)
    """Where artifacts, checkpoints and copies are kept."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Held-out evaluation."""
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)
    """Which students `student.start: latest` goes on with, and `kdflow history` marks."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Where metrics go besides JSON lines."""

    @model_validator(mode="after")
    def _live_teacher_fits(self) -> "RunConfig":
        width = self.teacher.ranks_per_replica
        inside = "mode: onpolicy" if self.mode == "onpolicy" else "delivery: live"
        if not isinstance(self.teacher, InProcessTeacher):
            if self.teacher_in_training:
                raise ValueError(
                    f"{inside} runs the teacher inside the training ranks, and teacher.type="
                    f"{self.teacher.type} runs elsewhere; set delivery=replay or "
                    "teacher.type=sglang"
                )
            return self
        if self.teacher_in_training and self.student.num_ranks % width:
            raise ValueError(
                f"{inside} runs the teacher in the student's ranks, and student.num_ranks="
                f"{self.student.num_ranks} is not a multiple of the {width} ranks of one copy "
                "of it (teacher.tensor_parallel x teacher.pipeline_parallel)"
            )
        if self.delivery == "live" and self.student.shuffle_window_shards is not None:
            raise ValueError(
                "student.shuffle_window_shards is about stored states, and delivery: live "
                "stores none"
            )
        if self.learns_from_spans_alone and self.student.shuffle_window_shards is not None:
            raise ValueError(
                "student.shuffle_window_shards is about stored states, and with loss.span_share: 1 "
                "training reads none; leave it out"
            )
        if self.replays and (self.teacher.sleep or self.teacher.forward_batches is not None):
            raise ValueError(
                "teacher.sleep and teacher.forward_batches are for `delivery: live` and `mode: "
                "onpolicy`; this run replays"
            )
        return self

    @model_validator(mode="after")
    def _machines_fit(self) -> "RunConfig":
        if isinstance(self.workers, RayWorkers):
            check_over_nodes(self)
        return self

    @model_validator(mode="after")
    def _mode_fits(self) -> "RunConfig":
        if (self.mode == "onpolicy") != (self.on_policy is not None):
            raise ValueError("`mode: onpolicy` and the section `on_policy` go together")
        lengths = [self.student.epochs, self.student.max_steps]
        if self.on_policy is None:
            if self.student.sleep:
                raise ValueError("student.sleep is for `mode: onpolicy`; leave it out")
            if sum(length is not None for length in lengths) != 1:
                raise ValueError("student: give exactly one of `epochs` and `max_steps`")
            if self.eval.keep_best is not None and self.eval.every_steps is None:
                raise ValueError(
                    f"eval.keep_best={self.eval.keep_best} goes by the held-out curve; set "
                    "eval.every_steps, too"
                )
            return self
        if any(length is not None for length in lengths):
            raise ValueError(
                "student.epochs and student.max_steps are for `mode: offpolicy`; here on_policy."
                "rounds and on_policy.steps_per_round say how long to train: leave them out"
            )
        if self.eval.every_steps is not None:
            raise ValueError(
                "eval.every_steps is for `mode: offpolicy`; every round measures its own held-out "
                "loss, of on_policy.heldout_sequences samples: leave it out"
            )
        check_on_policy(self, self.on_policy)
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> "RunConfig":
        kind = self.algorithm.type
        reads_stored = kind == "multi_teacher" or not self.algorithm.reads_signals
        if self.delivery != "replay" and reads_stored:
            raise ValueError(
                f"delivery={self.delivery} is not for algorithm.type={kind}, which reads "
                + ("stored states" if self.algorithm.reads_signals else "no teacher states")
                + "; leave `delivery` out"
            )
        if self.student.vocabulary_parallel and (
            not self.algorithm.IN_PARTS or self.loss.needs_whole_vocabulary
        ):
            what = self.loss.divergence.type if self.algorithm.IN_PARTS else kind
            raise ValueError(
                f"student.vocabulary_parallel is not for {what}, which needs whole output heads; "
                "leave it out"
            )
        if kind == "self_distillation" and self.student.start == "latest":
            raise ValueError(
                "student.start=latest is not for algorithm.type=self_distillation, whose teacher "
                "is the model that the student begins with; leave it out"
            )
        if kind == "self_distillation" and self.teacher.model != self.student.model:
            raise ValueError(
                "algorithm.type=self_distillation has the student for a teacher; give "
                "teacher.model the same model as student.model"
            )
        if (
            isinstance(self.algorithm, MultiTeacherConfig)
            and self.algorithm.by_source
            and self.student.shuffle_window_shards is not None
        ):
            raise ValueError(
                "student.shuffle_window_shards goes by the shards of one teacher, and here each "
                "teacher has those of its own `sources`; leave it out"
            )
        if isinstance(self.algorithm, MultiTeacherConfig):
            check_teachers(self.algorithm, self.data.source_names)
        return self

    @model_validator(mode="after")
    def _alignment_fits(self) -> "RunConfig":
        if isinstance(self.student.model, NewVocabularyModel) and self.alignment == "exact":
            raise ValueError(
                "alignment=exact: a student with student.model.type=new_vocabulary has other "
                "tokens than the teacher; leave `alignment` out"
            )
        if self.of_two_tokenizers and self.alignment == "exact":
            raise ValueError(
                f"{self.of_two_tokenizers} is for two tokenizers, and alignment=exact asks "
                "for one; leave one of the two out"
            )
        check_loss(self.algorithm, self.loss)
        by_spans = self.loss.span_share or self.loss.within_classes
        if by_spans and self.algorithm.type not in ("vanilla_kd", "sft"):
            raise ValueError(
                f"{self.loss.of_two_tokenizers} is not for algorithm.type={self.algorithm.type}; "
                "leave it out"
            )
        if self.alignment == "bytes" or isinstance(self.student.model, NewVocabularyModel):
            check_aligned(self)
        return self

    @model_validator(mode="after")
    def _signals_fit(self) -> "RunConfig":
        others = (
            [part.teacher for part in self.algorithm.teachers.values()]
            if isinstance(self.algorithm, MultiTeacherConfig)
            else []
        )
        for teacher in (self.teacher, *others):
            if teacher is not None and self.algorithm.reads_signals:
                check_signal(self.algorithm, teacher)
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> "RunConfig":
        answers = self.data.answers
        setting = self.loss.learns_from_samples
        if setting is None or self.algorithm.type == "sft":
            return self
        temperature = self.loss.divergence.temperature
        if self.on_policy is not None:
            check_samples(self.on_policy, setting, temperature)
            return self
        if (
            answers is None
            or answers.by != "student"
            or answers.fraction != 1
            or answers.top_p != 1
            or answers.temperature != temperature
        ):
            raise ValueError(
                f"{setting} learns from what the student has sampled; set data.answers with "
                "by=student, fraction=1, top_p=1 and the divergence's own temperature "
                f"({temperature:g})"
            )
        return self

    @property
    def of_two_tokenizers(self) -> str | None:
        """The fields that are set and mean nothing between models of one tokenizer."""
        if self.algorithm.READS_SPANS:
            return f"algorithm.type={self.algorithm.type}"
        return self.loss.of_two_tokenizers

    @property
    def replays(self) -> bool:
        """Whether teachers run before training, not in it."""
        return self.mode == "offpolicy" and self.delivery == "replay"

    @property
    def learns_from_spans_alone(self) -> bool:
        """Whether training needs of a teacher how probable it finds its tokens, and no more."""
        return self.algorithm.type == "vanilla_kd" and self.loss.span_share == 1

    @property
    def stores_log_probs(self) -> bool:
        """Whether of the training split the log-probabilities of the teacher's tokens are stored,
        and no states.
        """
        return self.replays and self.learns_from_spans_alone

    @property
    def trains_on_states(self) -> bool:
        """Whether training reads teachers' states, stored or of teachers that run beside it."""
        return self.algorithm.reads_signals and not self.stores_log_probs

    @property
    def stores_training_states(self) -> bool:
        """Whether the teachers' states of the training split are stored."""
        return self.replays and self.trains_on_states

    @property
    def measures_heldout(self) -> bool:
        """Whether training measures the held-out loss on its way."""
        return self.on_policy is not None or self.eval.every_steps is not None

    @property
    def heldout_sequences(self) -> int:
        """The largest number of held-out samples that training measures the loss on."""
        if self.on_policy is not None:
            return self.on_policy.heldout_sequences
        return self.eval.curve_sequences

    @property
    def teacher_in_training(self) -> bool:
        """Whether the teacher runs inside the training ranks."""
        return self.delivery == "live" or self.mode == "onpolicy"

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers; the run's own is called teacher."""
        if isinstance(self.algorithm, MultiTeacherConfig):
            return tuple(self.algorithm.teachers)
        return ("teacher",)

    @property
    def functions(self) -> dict[str, str]:
        """The Python functions that the run names, by field."""
        reward = None if self.on_policy is None else self.on_policy.reward
        named = {
            REWARD: None if reward is None else reward.function,
            VERIFIER: self.eval.verifier,
        }
        return {field: function for field, function in named.items() if function is not None}

    @property
    def engines_beside_student(self) -> bool:
        """Whether rollout engines share the GPUs of the ranks that train, on a cluster."""
        return isinstance(self.workers, RayWorkers) and self.workers.placement == "colocated"

    def rollout_engines(self, gpus: int) -> int:
        """Those of an on-policy run on a machine with so many GPUs, or over the nodes of a cluster,
        where ranks that train have one each.
        """
        assert self.on_policy is not None
        if isinstance(self.workers, RayWorkers):
            gpus = self.student.num_ranks if self.engines_beside_student else 0
        return self.on_policy.engines_on(gpus)

    @property
    def answering_ranks(self) -> int:
        """The ranks that write `data.answers`, if a model does, each with a copy of it."""
        answers = self.data.answers
        width = 1 if answers is None else answers.engine.ranks_per_replica
        return max(1, self.student.num_ranks // width)

    def sources_of(self, name: str) -> frozenset[str] | None:
        """The data sources that a teacher teaches; None for all of them."""
        if not isinstance(self.algorithm, MultiTeacherConfig):
            return None
        sources = self.algorithm.teachers[name].sources
        return None if sources is None else frozenset(sources)
