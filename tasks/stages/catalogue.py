"""The catalogue of stages: one record each, which flow, planner, launcher, ranks and tasks read.

A new stage is a record here, a function in `slices.py` and a job in `tasks/jobs`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from configs.schema.engines import Engine
from configs.schema.rollout import Rollout
from configs.schema.run import RunConfig
from configs.schema.teacher import Teacher
from tasks.stages import benchmark_slices, slices
from tasks.stages.slices import Known, Slice

# SGLang's processes warn of kernels that other hardware has.
QUIET = MappingProxyType({"PYTHONWARNINGS": "ignore"})


def one(run: RunConfig) -> int:
    """One, for whatever a record counts."""
    del run
    return 1


def no_engine(run: RunConfig) -> tuple[str, ...]:
    """The engines of a stage that runs no model."""
    del run
    return ()


def never(run: RunConfig) -> bool:
    """False, for whatever a record asks."""
    del run
    return False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    `kind` is that of its artifact, which later stages find under the name `output`. `code_version`
    is raised whenever its code gives another output for the same config: that is what makes old
    artifacts stale. `slice` yields what identifies its artifacts, none where a run has none; one
    that stands `behind_delivery` is planned once `delivery: auto` is decided.

    `job` is what its ranks do, as `"module:function"`; `ranks` how many they are, with `env` in
    their environment where it is not set. `portions` is the number of tasks that divide its work.
    `engines` are the sections of the config that say in which engine it runs a model.
    `in_rounds` says that rounds make its artifact in a run, and no job.
    """

    name: str
    kind: str
    output: str
    code_version: int
    description: str
    job: str
    slice: Callable[[Known], Iterator[Slice]]
    behind_delivery: bool = True
    ranks: Callable[[RunConfig], int] = one
    env: Mapping[str, str] = field(default_factory=dict)
    portions: Callable[[RunConfig], int] = one
    engines: Callable[[RunConfig], tuple[str, ...]] = no_engine
    in_rounds: Callable[[RunConfig], bool] = never


@dataclass(frozen=True, kw_only=True)
class RoundArtifact:
    """What each round of on-policy training leaves: its `kind`, as a `Stage` has it; the task that
    makes it.
    """

    kind: str
    code_version: int
    task: str


def engines_of(run: RunConfig, stage: str) -> dict[str, Teacher | Engine | Rollout]:
    """The engines in which a stage runs, by the sections of the config that say so."""
    found: dict[str, Any] = {}
    for place in CATALOGUE[stage].engines(run):
        section: Any = run
        for name in place.split("."):
            section = getattr(section, name)
        found[place] = section
    return found


def devices_of(run: RunConfig, stage: str) -> int:
    """How many accelerators each rank of a stage uses, where there are any."""
    if stage != "generate":
        return 1
    assert run.data.answers is not None
    return run.data.answers.engine.ranks_per_replica


def _training_engines(run: RunConfig) -> tuple[str, ...]:
    rollout = () if run.on_policy is None else ("on_policy.rollout",)
    teaches = run.teacher_in_training and run.algorithm.reads_signals
    return (*rollout, "teacher") if teaches else rollout


_STAGES = (
    Stage(
        name="prepare-teacher",
        kind="model",
        output="teacher_model",
        code_version=2,
        description="Convert the teacher to a Hugging Face folder",
        job="tasks.jobs.preparation:prepare_model",
        slice=slices.teacher_models,
        behind_delivery=False,
    ),
    Stage(
        name="prepare-student",
        kind="model",
        output="student_model",
        code_version=2,
        description="Make the student's initial weights",
        job="tasks.jobs.preparation:prepare_model",
        slice=slices.student_model,
        behind_delivery=False,
    ),
    Stage(
        name="lm-eval-teacher",
        kind="benchmarks",
        output="teacher_benchmarks",
        code_version=1,
        description="Benchmarks of the teacher",
        job="tasks.jobs.benchmarks:benchmark_teacher",
        slice=benchmark_slices.teacher_benchmarks,
        ranks=lambda run: run.teacher.ranks_per_replica,  # by SGLang; else one rank is all
        engines=lambda run: ("teacher",) if run.teacher.type == "sglang" else (),
        behind_delivery=False,  # before all that costs, as names and data of tasks may be wrong
    ),
    Stage(
        name="tokenize",
        kind="tokens",
        output="tokens",
        code_version=7,
        description="Text to supervised token ids",
        job="tasks.jobs.tokenizing:tokenize_data",
        slice=slices.tokens,
        behind_delivery=False,
    ),
    Stage(
        name="generate",
        kind="answers",
        output="answers",
        code_version=6,
        description="A model's answers to the training prompts",
        job="tasks.jobs.answering:generate_answers",
        slice=slices.answers,
        behind_delivery=False,
        ranks=lambda run: run.answering_ranks,
        env=QUIET,
        engines=lambda _run: ("data.answers.engine",),
    ),
    Stage(
        name="estimate",
        kind="estimate",
        output="estimate",
        code_version=2,
        description="Probe teacher and student",
        job="tasks.jobs.probing:estimate_run",
        slice=slices.estimate,
        behind_delivery=False,
        ranks=lambda run: max(run.student.num_ranks, run.teacher.ranks_per_replica),
        engines=lambda _run: ("teacher",),
    ),
    Stage(
        name="extract",
        kind="states",
        output="states",
        code_version=4,
        description="Teacher hidden states to the store",
        job="tasks.jobs.extraction:extract_states",
        slice=slices.states,
        ranks=lambda run: run.teacher.num_ranks,
        portions=lambda run: run.teacher.num_workers,
        engines=lambda _run: ("teacher",),
    ),
    Stage(
        name="score-tokens",
        kind="log_probs",
        output="log_probs",
        code_version=1,
        description="Teacher log-probabilities of the samples' own tokens",
        job="tasks.jobs.scoring:score_tokens",
        slice=slices.log_probs,
        ranks=lambda run: run.teacher.num_ranks,
        engines=lambda _run: ("teacher",),
    ),
    Stage(
        name="train",
        kind="student",
        output="student",
        code_version=7,
        description="Distill the student under FSDP2",
        job="tasks.jobs.training:train_student",
        slice=slices.student,
        ranks=lambda run: run.student.num_ranks,
        engines=_training_engines,
        in_rounds=lambda run: run.on_policy is not None,
    ),
    Stage(
        name="evaluate",
        kind="evaluation",
        output="evaluation",
        code_version=7,
        description="Held-out scores of teacher and student",
        job="tasks.jobs.evaluation:evaluate_student",
        slice=slices.evaluation,
    ),
    Stage(
        name="lm-eval",
        kind="benchmarks",
        output="student_benchmarks",
        code_version=1,
        description="Benchmarks of the student",
        job="tasks.jobs.benchmarks:benchmark_student",
        slice=benchmark_slices.student_benchmarks,
    ),
    Stage(
        name="report",
        kind="report",
        output="report",
        code_version=6,
        description="The HTML report",
        job="tasks.jobs.reporting:write_page",
        slice=slices.report,
    ),
)
_BY_NAME = {stage.name: stage for stage in _STAGES}
CATALOGUE: Mapping[str, Stage] = MappingProxyType(_BY_NAME)

ROLLOUTS = RoundArtifact(kind="rollouts", code_version=5, task="rollout")
ROUND = RoundArtifact(kind="round", code_version=4, task="train")
ROUND_ARTIFACTS: Mapping[str, RoundArtifact] = MappingProxyType(
    {made.kind: made for made in (ROLLOUTS, ROUND)}
)
