"""The stages of a run and what identifies each: computed without a server and without a model.

A stage's digest is over its kind, its code version, the slice of the config that can change its
output, and the digests of its inputs. Sizes of batches, numbers of ranks and paths stand outside.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.schema.algorithm import MultiTeacherConfig, VanillaKDConfig
from configs.schema.models import GgufModel, LayerDropModel
from configs.schema.run import RunConfig
from configs.secrets import public, public_config
from kdflow_core.errors import ModelError
from storage.artifact import ArtifactRef, Manifest
from storage.digest import artifact_digest
from storage.fingerprint import Fingerprints
from storage.store import ArtifactStore
from tasks.estimate import estimate_slice, prospect, read_estimate, with_source
from tasks.slices import (
    answers_slice,
    evaluation_slice,
    gguf_slice,
    model_identity,
    reward_input,
    states_slice,
    tokenizer_identity,
    tokens_inputs,
    tokens_slice,
    training_slice,
)

# Raise a stage's number whenever its code would give another output for the same config.
CODE_VERSIONS = {
    "model": 2,
    "tokens": 2,
    "answers": 2,
    "states": 4,
    "estimate": 2,
    "student": 4,
    "rollouts": 3,
    "round": 3,
    "evaluation": 3,
    "report": 2,
}

MOST_COMPARED = 32  # artifacts that a new one is told apart from

# Under which name later stages find a stage's artifact.
OUTPUTS = {
    "prepare-teacher": "teacher_model",
    "prepare-student": "student_model",
    "tokenize": "tokens",
    "generate": "answers",
    "estimate": "estimate",
    "extract": "states",
    "train": "student",
    "evaluate": "evaluation",
    "report": "report",
}


# What a round makes, and which of its tasks makes it.
RoundKind = Literal["rollouts", "round"]
ROUND_STAGES: dict[RoundKind, str] = {"rollouts": "rollout", "round": "train"}


class StageIdentity(BaseModel):
    """What a stage's artifact is addressed by, and which of the run's teachers it is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    output: str
    teacher: str = "teacher"
    kind: str
    code_version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def name(self) -> str:
        """The stage, and the teacher where it is not the run's own."""
        return self.stage if self.teacher == "teacher" else f"{self.stage}-{self.teacher}"

    @property
    def digest(self) -> str:
        """The artifact's digest. The names of stage, output and teacher are not part of it."""
        return artifact_digest(
            kind=self.kind,
            code_version=self.code_version,
            config=self.config,
            inputs=self.inputs,
        )


class Share(BaseModel):
    """One of `of` parts of a stage's work, counted from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    of: int


class StageSpec(BaseModel):
    """All that a stage gets: its identity, the run, and the artifacts made so far, by name.

    With a `share`, it does that part of the work, and leaves the artifact uncommitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    run: RunConfig
    inputs: dict[str, ArtifactRef]
    share: Share | None = None


class StageStatus(BaseModel):
    """What `kdflow plan` says about a stage: cached, or what changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    cached: bool
    reasons: tuple[str, ...]


def open_store(run: RunConfig) -> ArtifactStore:
    """The run's artifact store."""
    return ArtifactStore(root=run.storage.root, scratch=run.storage.scratch)


def plan_stages(run: RunConfig) -> dict[str, StageIdentity]:
    """The stages of a run by name, in the order in which they run.

    Those of `source: auto` end with its estimate, which decides on what follows.

    Raises DataError, ModelError or StoreError for data or models that are not there.
    """
    plan = _Plan(run)
    plan.prepare()
    plan.data()
    if run.source == "auto":
        models = {"teacher_model": plan.teacher_ids["teacher"], "student_model": plan.student_id}
        plan.add("estimate", "estimate", estimate_slice(run), models | plan.data_inputs)
        return plan.stages
    upstream: dict[str, str] = dict(plan.data_inputs)
    for name, teacher_id in plan.teacher_ids.items():
        states = plan.add(
            "extract",
            "states",
            states_slice(run_of_teacher(run, name), run.sources_of(name)),
            plan.data_inputs | {"teacher_model": teacher_id},
            teacher=name,
        )
        upstream |= {
            of_teacher("states", name): states.digest,
            of_teacher("teacher_model", name): teacher_id,
        }
    upstream["student_model"] = plan.student_id
    training = {
        key: value
        for key, value in upstream.items()
        # On-policy, stored states are of the held-out sequences, whose loss ends each round.
        if run.stores_training_states or run.on_policy or not key.startswith("states")
    } | reward_input(run, plan.prints)
    upstream["student"] = plan.add("train", "student", training_slice(run), training).digest
    evaluated = plan.add("evaluate", "evaluation", evaluation_slice(run), upstream)
    upstream["evaluation"] = evaluated.digest
    plan.add("report", "report", {"run": public_config(run)}, upstream)
    return plan.stages


class _Plan:
    """The stages so far, and what identifies models and data."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.stages: dict[str, StageIdentity] = {}
        self.teacher_ids: dict[str, str] = {}
        self.student_id = ""
        self.data_inputs: dict[str, str] = {}
        self.prints = Fingerprints(run.storage.scratch)
        self._prepared: dict[str, str] = {}

    def add(
        self,
        stage: str,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        teacher: str = "teacher",
    ) -> StageIdentity:
        """One more stage, of one of the teachers where there are several."""
        identity = StageIdentity(
            stage=stage,
            output=of_teacher(OUTPUTS[stage], teacher),
            teacher=teacher,
            kind=kind,
            code_version=CODE_VERSIONS[kind],
            config=public(dict(config)),
            inputs=dict(inputs),
        )
        self.stages[identity.name] = identity
        return identity

    def prepare(self) -> None:
        """Models that are not Hugging Face folders yet."""
        for name in self.run.teacher_names:
            model = run_of_teacher(self.run, name).teacher.model
            if isinstance(model, GgufModel):
                made = self.add("prepare-teacher", "model", gguf_slice(model), {}, teacher=name)
                self._prepared[name] = made.digest
            prepared = self._prepared.get(name)
            self.teacher_ids[name] = model_identity(model, prepared, self.prints)
        student = self.run.student.model
        if isinstance(student, GgufModel):
            made = self.add("prepare-student", "model", gguf_slice(student), {})
            self._prepared["student"] = made.digest
        elif isinstance(student, LayerDropModel):
            dropped = {"type": "layer_drop", "drop_layers": sorted(student.drop_layers)}
            of = {"teacher_model": self.teacher_ids["teacher"]}
            self._prepared["student"] = self.add("prepare-student", "model", dropped, of).digest
        self.student_id = model_identity(student, self._prepared.get("student"), self.prints)

    def data(self) -> None:
        """Tokens, and answers that a model writes. Raises ModelError for another tokenizer."""
        inputs = tokens_inputs(self.run, self._prepared, self.prints)
        for name in self.teacher_ids:
            model = run_of_teacher(self.run, name).teacher.model
            other = tokenizer_identity(model, self._prepared.get(name), self.prints)
            if other != inputs["teacher_tokenizer"]:
                raise ModelError(
                    f"algorithm.teachers.{name} has other tokenizer files than `teacher`; teachers "
                    "of one run need the same tokenizer"
                )
        tokens = self.add("tokenize", "tokens", tokens_slice(self.run), inputs)
        self.data_inputs = {"tokens": tokens.digest}
        if self.run.data.answers is not None:
            by = self.run.data.answers.by
            generator = self.teacher_ids["teacher"] if by == "teacher" else self.student_id
            written = self.add(
                "generate",
                "answers",
                answers_slice(self.run),
                self.data_inputs | {f"{by}_model": generator},
            )
            self.data_inputs["answers"] = written.digest


def round_identity(train: StageIdentity, kind: RoundKind, number: int) -> StageIdentity:
    """What one round of on-policy training makes: `rollouts` the answers, `round` its record."""
    return StageIdentity(
        stage=ROUND_STAGES[kind],
        output=f"{kind}-{number}",
        kind=kind,
        code_version=CODE_VERSIONS[kind],
        config=train.config | {"round": number},
        inputs=train.inputs,
    )


def round_identities(train: StageIdentity, run: RunConfig) -> dict[str, StageIdentity]:
    """Those of all rounds of a run, by task and round."""
    rounds = 0 if run.on_policy is None else run.on_policy.rounds
    return {
        f"{stage}-{number}": round_identity(train, kind, number)
        for number in range(1, rounds + 1)
        for kind, stage in ROUND_STAGES.items()
    }


def of_teacher(output: str, name: str) -> str:
    """Under which name a stage's artifact is found that is about one of several teachers."""
    return output if name == "teacher" else f"{output}_{name}"


def run_of_teacher(run: RunConfig, name: str) -> RunConfig:
    """The run as one of its teachers has it: with that one as its own."""
    if not isinstance(run.algorithm, MultiTeacherConfig) or name == "teacher":
        return run
    teacher = run.algorithm.teachers[name].teacher
    return run.model_copy(update={"teacher": teacher, "algorithm": VanillaKDConfig()})


def spec_of_teacher(spec: StageSpec, name: str) -> StageSpec:
    """A stage's spec as one of several teachers has it: with its model and states."""
    if name == "teacher":
        return spec
    inputs = {k: v for k, v in spec.inputs.items() if k not in {"teacher_model", "states"}}
    for key in ("teacher_model", "states"):
        if of_teacher(key, name) in spec.inputs:
            inputs[key] = spec.inputs[of_teacher(key, name)]
    return spec.model_copy(update={"run": run_of_teacher(spec.run, name), "inputs": inputs})


def stage_spec(
    identity: StageIdentity, run: RunConfig, done: Mapping[str, ArtifactRef]
) -> StageSpec:
    """All that a stage of a plan gets."""
    spec = StageSpec(identity=identity, run=run, inputs=dict(done))
    return spec_of_teacher(spec, identity.teacher)


def stage_status(run: RunConfig) -> list[StageStatus]:
    """For each stage: whether it would be served from cache, else why not."""
    store = open_store(run)
    statuses = []
    plan = plan_stages(run)
    estimate = plan.get("estimate")
    if estimate and (ref := store.find(estimate.kind, estimate.digest)):
        plan |= plan_stages(decided(run, ref))
    for identity in plan.values():
        absent = store.why_absent(identity.kind, identity.digest)
        reasons = () if absent is None else tuple(explain(identity, absent, store))
        if absent is not None and identity.stage == "train":
            reasons += _rounds_done(identity, run, store)
        statuses.append(StageStatus(identity=identity, cached=absent is None, reasons=reasons))
    return statuses


def _rounds_done(train: StageIdentity, run: RunConfig, store: ArtifactStore) -> tuple[str, ...]:
    """How far an on-policy run has come."""
    if run.on_policy is None:
        return ()
    rounds = [i for i in round_identities(train, run).values() if i.kind == "round"]
    done = sum(store.find(i.kind, i.digest) is not None for i in rounds)
    return (f"{done} of {len(rounds)} rounds are done",)


def decided(run: RunConfig, estimate: ArtifactRef) -> RunConfig:
    """The run with the source that its estimate chooses."""
    store = open_store(run)
    outcome = prospect(run, read_estimate(store, estimate), store.free_bytes())
    return with_source(run, outcome.source)


def explain(identity: StageIdentity, absent: str, store: ArtifactStore) -> list[str]:
    """Why a stage runs: its artifact is damaged, or what differs from the nearest finished one."""
    if absent != "never finished":
        return [absent]
    candidates = [
        _differences(identity, m) for m in store.newest_manifests(identity.kind, MOST_COMPARED)
    ]
    if not candidates:
        return ["no artifact of this kind yet"]
    return min(candidates, key=len)


def _differences(identity: StageIdentity, manifest: Manifest) -> list[str]:
    lines = []
    if identity.code_version != manifest.code_version:
        lines.append(f"code version: {manifest.code_version} -> {identity.code_version}")
    old, new = _flatten(manifest.config), _flatten(identity.config)
    lines += [
        f"{key}: {old.get(key, '(unset)')} -> {new.get(key, '(unset)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for name in sorted(manifest.inputs.keys() | identity.inputs.keys()):
        before, after = manifest.inputs.get(name, "none"), identity.inputs.get(name, "none")
        if before != after:
            lines.append(f"input {name}: {before[:12]} -> {after[:12]}")
    return lines or ["its manifest was removed"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flatten(inner, name).items()}
