"""The root of the config: one run of the flow `kd`."""

from typing import Literal

from pydantic import Field, model_validator

from configs.schema.algorithm import Algorithm, MultiTeacherConfig, VanillaKDConfig
from configs.schema.base import MOST, SEEDS, PathText, StrictModel
from configs.schema.data import DataConfig
from configs.schema.loss import LossConfig
from configs.schema.on_policy import OnPolicyConfig
from configs.schema.student import StudentConfig
from configs.schema.teacher import InProcessTeacher, Teacher


class StorageConfig(StrictModel):
    """`root` holds finished artifacts (a folder or an fsspec URL); `scratch` is a local folder for
    checkpoints and for copies of remote artifacts. Relative paths start at the current directory.
    `shard_rows` and `chunk_rows` override the sizes derived from the row width. `codec` is the form
    of stored states: `raw` bfloat16 (read without a copy), `planes` (lossless, about 30 % smaller)
    or `int8` (lossy, half the size; what it costs is measured and recorded). Shards of a remote
    store are copied to `scratch` as they are read, `read_cache_gb` of them at most. What will not
    fit a local disk is refused before it is computed, unless `check_room` is off.
    """

    root: PathText = ".kdflow/store"
    scratch: PathText = ".kdflow/scratch"
    shard_rows: int | None = Field(default=None, gt=0, le=MOST)
    chunk_rows: int | None = Field(default=None, gt=0, le=MOST)
    codec: Literal["raw", "planes", "int8"] = "raw"
    read_cache_gb: float = Field(default=100.0, gt=0)
    check_room: bool = True

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


class EvalConfig(StrictModel):
    """Held-out evaluation. `max_generations` prompts are answered greedily by teacher and student;
    0 turns generation off. With `every_steps`, off-policy training measures the held-out loss of
    `curve_sequences` samples before it, every so many optimizer steps and at its end.
    """

    every_steps: int | None = Field(default=None, gt=0, le=MOST)
    curve_sequences: int = Field(default=64, gt=0, le=MOST)
    tokens_per_batch: int = Field(default=8192, gt=0, le=MOST)
    max_generations: int = Field(default=32, ge=0, le=MOST)
    max_new_tokens: int = Field(default=128, gt=0, le=MOST)


class TrackingConfig(StrictModel):
    """Where metrics go besides JSONL. Weights & Biases needs the package `wandb`."""

    tensorboard: bool = True
    wandb_project: str | None = None


class RunConfig(StrictModel):
    """One complete run.

    `mode: offpolicy` trains on given answers, `onpolicy` on what the student samples, round by
    round, as `on_policy` says; there the teacher runs inside the training ranks, and `source` has
    no say.

    With `source: replay` the teacher runs once and training reads its stored states; with `live` it
    runs inside the training ranks, and only held-out states are stored. `auto` probes both for a
    few batches and takes the cheaper one, given that `planned_runs` runs will use the same teacher
    and data. An `algorithm` that reads no teacher states in training has no use for them, and
    leaves `source` at its default.

    A rank that is stopped, or makes no progress for `stall_limit_s` seconds, ends its stage, which
    is tried again from where it was.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    mode: Literal["offpolicy", "onpolicy"] = "offpolicy"
    data: DataConfig
    source: Literal["replay", "live", "auto"] = "replay"
    planned_runs: int = Field(default=1, gt=0, le=MOST)
    stall_limit_s: float = Field(default=1800, gt=0)
    teacher: Teacher
    student: StudentConfig
    algorithm: Algorithm = Field(default_factory=VanillaKDConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    on_policy: OnPolicyConfig | None = None
    storage: StorageConfig = Field(default_factory=StorageConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _live_teacher_fits(self) -> "RunConfig":
        width = self.teacher.ranks_per_replica
        inside = "mode: onpolicy" if self.mode == "onpolicy" else "source: live"
        if not isinstance(self.teacher, InProcessTeacher):
            if self.teacher_in_training:
                raise ValueError(
                    f"{inside} runs the teacher inside the training ranks, and teacher.type="
                    f"{self.teacher.type} runs elsewhere; set source=replay or teacher.type=sglang"
                )
            return self
        if self.teacher_in_training and self.student.num_ranks % width:
            raise ValueError(
                f"{inside} runs the teacher in the student's ranks, and student.num_ranks="
                f"{self.student.num_ranks} is not a multiple of the {width} ranks of one copy "
                "of it (teacher.tensor_parallel x teacher.pipeline_parallel)"
            )
        if self.source == "live" and self.student.shuffle_window_shards is not None:
            raise ValueError(
                "student.shuffle_window_shards is about stored states, and source: live stores none"
            )
        if self.replays and (self.teacher.sleep or self.teacher.forward_batches is not None):
            raise ValueError(
                "teacher.sleep and teacher.forward_batches are for `source: live` and `mode: "
                "onpolicy`; this run replays"
            )
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
        _check_on_policy(self, self.on_policy)
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> "RunConfig":
        kind = self.algorithm.type
        reads_stored = kind == "multi_teacher" or not self.algorithm.reads_signals
        if self.source != "replay" and reads_stored:
            raise ValueError(
                f"source={self.source} is not for algorithm.type={kind}, which reads "
                + ("stored states" if self.algorithm.reads_signals else "no teacher states")
                + "; leave `source` out"
            )
        if self.student.vocabulary_parallel and (
            kind == "self_distillation" or self.loss.needs_whole_vocabulary
        ):
            what = kind if kind == "self_distillation" else self.loss.divergence.type
            raise ValueError(
                f"student.vocabulary_parallel is not for {what}, which needs whole output heads; "
                "leave it out"
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
            _check_teachers(self.algorithm, self.data.source_names, self.teacher)
        return self

    @model_validator(mode="after")
    def _signals_fit(self) -> "RunConfig":
        others = (
            [share.teacher for share in self.algorithm.teachers.values()]
            if isinstance(self.algorithm, MultiTeacherConfig)
            else []
        )
        for teacher in (self.teacher, *others):
            if teacher is not None and self.algorithm.reads_signals:
                _check_signal(self.algorithm, teacher)
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> "RunConfig":
        answers = self.data.answers
        if not self.loss.learns_from_samples or self.algorithm.type == "sft":
            return self
        temperature = self.loss.divergence.temperature
        if self.on_policy is not None:
            _check_samples(self.on_policy, temperature)
            return self
        if (
            answers is None
            or answers.by != "student"
            or answers.fraction != 1
            or answers.top_p != 1
            or answers.temperature != temperature
        ):
            raise ValueError(
                "loss.divergence sampled_reverse_kl learns from what the student has sampled; set "
                "data.answers with by=student, fraction=1, top_p=1 and the divergence's own "
                f"temperature ({temperature:g})"
            )
        return self

    @property
    def replays(self) -> bool:
        """Whether teachers run before training, not in it."""
        return self.mode == "offpolicy" and self.source == "replay"

    @property
    def stores_training_states(self) -> bool:
        """Whether the teachers' states of the training split are stored."""
        return self.replays and self.algorithm.reads_signals

    @property
    def measures_heldout(self) -> bool:
        """Whether training measures the held-out loss on its way."""
        return self.on_policy is not None or self.eval.every_steps is not None

    @property
    def heldout_sequences(self) -> int:
        """Of how many held-out samples training measures the loss, at most."""
        if self.on_policy is not None:
            return self.on_policy.heldout_sequences
        return self.eval.curve_sequences

    @property
    def teacher_in_training(self) -> bool:
        """Whether the teacher runs inside the training ranks."""
        return self.source == "live" or self.mode == "onpolicy"

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers; the run's own is called teacher."""
        if isinstance(self.algorithm, MultiTeacherConfig):
            return tuple(self.algorithm.teachers)
        return ("teacher",)

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


def _check_signal(algorithm: Algorithm, teacher: Teacher) -> None:
    if teacher.SIGNAL not in algorithm.SIGNALS:
        raise ValueError(
            f"algorithm.type={algorithm.type} reads the signals {sorted(algorithm.SIGNALS)}, and "
            f"teacher.type={teacher.type} gives {teacher.SIGNAL}; set another of the two"
        )


def _check_on_policy(run: RunConfig, on_policy: OnPolicyConfig) -> None:
    if run.source != "replay":
        raise ValueError("`source` is for `mode: offpolicy`; leave it out")
    if run.data.answers is not None and run.data.answers.fraction != 1:
        raise ValueError(
            "data.answers.fraction is for `mode: offpolicy`; here only prompts without an answer "
            "get one, and on_policy.fraction says how many the student answers; leave it out"
        )
    if run.algorithm.type not in {"vanilla_kd", "self_distillation"}:
        raise ValueError(
            f"algorithm.type={run.algorithm.type} is not for `mode: onpolicy`, which has "
            "vanilla_kd and self_distillation"
        )
    if run.student.shuffle_window_shards is not None:
        raise ValueError(
            "student.shuffle_window_shards is about stored states, and `mode: onpolicy` stores none"
        )
    if on_policy.max_staleness and run.student.sleep:
        raise ValueError(
            "on_policy.max_staleness trains while the next round is rolled out, and student.sleep "
            "sleeps then; leave one of them out"
        )
    if on_policy.prompt_weights is not None:
        unknown = sorted(set(on_policy.prompt_weights) - set(run.data.source_names))
        if unknown:
            raise ValueError(
                f"on_policy.prompt_weights names {unknown}; the data sources are "
                f"{sorted(run.data.source_names)}"
            )


def _check_samples(on_policy: OnPolicyConfig, temperature: float) -> None:
    whole = on_policy.top_p == 1 and on_policy.top_k == 0
    if not (on_policy.all_sampled and whole and on_policy.temperature == temperature):
        raise ValueError(
            "loss.divergence sampled_reverse_kl learns from what the student has sampled; set "
            "on_policy.fraction to the constant 1, top_p=1, top_k=0 and the divergence's own "
            f"temperature ({temperature:g})"
        )


def _check_teachers(
    algorithm: MultiTeacherConfig, source_names: tuple[str, ...], main: Teacher
) -> None:
    taught = [s for share in algorithm.teachers.values() for s in share.sources or ()]
    if taught and set(taught) != set(source_names):
        raise ValueError(
            f"algorithm.teachers have the data sources {sorted(taught)}, the data has "
            f"{sorted(source_names)}; each source needs its teacher"
        )
    for name, share in algorithm.teachers.items():
        if share.teacher is not None and share.teacher.chat_template != main.chat_template:
            raise ValueError(
                f"algorithm.teachers.{name} has another chat_template than `teacher`; teachers of "
                "one run see the same text"
            )
