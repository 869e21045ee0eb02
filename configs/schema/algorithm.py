"""From whom the student learns, on which tokens, with which weights."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from configs.schema.base import StrictModel
from configs.schema.loss import LossConfig
from configs.schema.signals import SignalKind
from configs.schema.teacher import Teacher


class _Algorithm(StrictModel):
    """`SIGNALS` are the kinds of signals that training can read; a teacher gives one of them. An
    algorithm of `text` alone reads nothing that a teacher has computed. One that is not `IN_PARTS`
    needs whole output heads on every rank; one that `COMPARES_CLASSES` does so by `loss`, where
    there are two tokenizers; one that `READS_SPANS` needs two.
    """

    SIGNALS: ClassVar[frozenset[SignalKind]] = frozenset({"hidden"})
    IN_PARTS: ClassVar[bool] = True
    COMPARES_CLASSES: ClassVar[bool] = True
    READS_SPANS: ClassVar[bool] = False

    @property
    def reads_signals(self) -> bool:
        """Whether training reads what a teacher has computed before."""
        return "text" not in self.SIGNALS


class SFTConfig(_Algorithm):
    """Cross-entropy alone; the section `loss` is not used. The teacher is for evaluation."""

    SIGNALS = frozenset({"text"})

    type: Literal["sft"] = "sft"


class VanillaKDConfig(_Algorithm):
    """Cross-entropy and a divergence from one teacher, as `loss` says."""

    type: Literal["vanilla_kd"] = "vanilla_kd"


class DualSpaceConfig(_Algorithm):
    """Dual-space distillation (DSKD, 2406.17328, 2504.11426): the divergence is taken twice, once
    over the student's vocabulary, where a projector brings the teacher's states, and once over the
    teacher's, where another brings the student's. For models of one tokenizer or of two.
    """

    IN_PARTS = False
    COMPARES_CLASSES = False

    type: Literal["dual_space"] = "dual_space"
    projector_lr: float = Field(default=1e-3, gt=0)
    """The peak learning rate of both projectors, on the student's schedule."""


class GoldConfig(_Algorithm):
    """GOLD's comparison of two tokenizers (TRL's `ULDLoss`, hybrid, merged as `bayesian`): runs of
    tokens that spell the same as one step each, tokens that both have by the Jensen-Shannon
    divergence, all others by their ranks. Of `loss`, it reads `kd_ratio` and `logits_memory_mb`.
    """

    IN_PARTS = False
    COMPARES_CLASSES = False
    READS_SPANS = True

    type: Literal["gold"] = "gold"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of the mixture that matched tokens are compared with."""
    matched_weight: float | None = Field(default=None, ge=0, le=1)
    """What matched tokens count, ranks counting the rest; by default the share of the teacher's
    tokens that are matched.
    """


class TaughtPart(StrictModel):
    """What one of several teachers teaches."""

    teacher: Teacher | None = None
    """How the teacher is run; the one named `teacher` is the run's own and has none here."""
    weight: float = Field(default=1.0, gt=0)
    """The weight of its divergence, over the sum of all weights."""
    sources: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    """The data sources whose samples it teaches; by default all."""


class MultiTeacherConfig(_Algorithm):
    """Several teachers, which may have tokenizers and chat templates of their own."""

    type: Literal["multi_teacher"] = "multi_teacher"
    teachers: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*$")], TaughtPart] = Field(
        min_length=2
    )
    """The teachers by name: all of them with `sources`, or none."""

    @property
    def by_source(self) -> bool:
        """Whether each teacher has data sources of its own."""
        return any(part.sources is not None for part in self.teachers.values())

    @model_validator(mode="after")
    def _names_and_shares(self) -> "MultiTeacherConfig":
        without = [name for name, part in self.teachers.items() if part.teacher is None]
        if without != ["teacher"]:
            raise ValueError(
                "of `teachers`, the one named 'teacher' is the run's own and has no `teacher` "
                f"field; all others have one. Without it are: {without or 'none'}"
            )
        if "student" in self.teachers:
            raise ValueError("a teacher cannot be named 'student'; give it another name")
        routed = [part.sources is not None for part in self.teachers.values()]
        if any(routed) and not all(routed):
            raise ValueError("`sources` stand on some teachers only; give them to all or to none")
        named = [source for part in self.teachers.values() for source in part.sources or ()]
        if len(set(named)) != len(named):
            raise ValueError("a data source has two teachers; `sources` must not overlap")
        return self


class SelfDistillationConfig(_Algorithm):
    """The student's own weights teach it.

    `teacher.model` is then the student's, for evaluation, and `teacher.chat_template` is what the
    teacher sees.
    """

    SIGNALS = frozenset({"text"})
    IN_PARTS = False

    type: Literal["self_distillation"] = "self_distillation"
    update: Literal["synchronized", "ema"] = "ema"
    """`synchronized`: the teacher has the student's weights of the moment; `ema`: their moving
    average.
    """
    decay: float = Field(default=0.999, ge=0, lt=1)
    """What is left of the average after a step."""


Algorithm = Annotated[
    SFTConfig
    | VanillaKDConfig
    | DualSpaceConfig
    | GoldConfig
    | MultiTeacherConfig
    | SelfDistillationConfig,
    Field(discriminator="type"),
]


def check_signal(algorithm: Algorithm, teacher: Teacher) -> None:
    """Refuse a teacher whose signal an algorithm does not read. Raises ValueError."""
    if teacher.SIGNAL not in algorithm.SIGNALS:
        raise ValueError(
            f"algorithm.type={algorithm.type} reads the signals {sorted(algorithm.SIGNALS)}, and "
            f"teacher.type={teacher.type} gives {teacher.SIGNAL}; set another of the two"
        )


def check_loss(algorithm: Algorithm, loss: LossConfig) -> None:
    """Refuse what an algorithm with a comparison of its own does not read. Raises ValueError."""
    setting = loss.of_two_tokenizers or loss.learns_from_samples
    if not algorithm.COMPARES_CLASSES and setting:
        raise ValueError(
            f"{setting} is not for algorithm.type={algorithm.type}, which compares models in a way "
            "of its own; leave it out"
        )
    if not isinstance(algorithm, GoldConfig):
        return
    usual = LossConfig()
    for name in ("divergence", "token_weight"):
        if getattr(loss, name) != getattr(usual, name):
            raise ValueError(
                f"loss.{name} is not for algorithm.type=gold, which has a divergence of its own; "
                "leave it out"
            )


def check_teachers(algorithm: MultiTeacherConfig, source_names: tuple[str, ...]) -> None:
    """Refuse teachers that do not fit the data. Raises ValueError."""
    taught = [s for part in algorithm.teachers.values() for s in part.sources or ()]
    if taught and set(taught) != set(source_names):
        raise ValueError(
            f"algorithm.teachers have the data sources {sorted(taught)}, the data has "
            f"{sorted(source_names)}; each source needs its teacher"
        )
