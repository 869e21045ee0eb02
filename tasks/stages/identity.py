"""What a stage's artifact is addressed by, and what a stage is given.

A digest is over the artifact's kind, the stage's code version, the slice of the config that can
change its output, and the digests of its inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.schema.algorithm import MultiTeacherConfig, VanillaKDConfig
from configs.schema.models import (
    GgufModel,
    LayerDropModel,
    NewVocabularyModel,
    PretrainedModel,
)
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef, FileRecord
from storage.digest import artifact_digest
from storage.store import ArtifactStore


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


class Portion(BaseModel):
    """One of `of` parts of a stage's work, counted from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    of: int


class StageSpec(BaseModel):
    """All that a stage gets: its identity, the run, and the artifacts made so far, by name.

    With a `portion`, it does that part of the work, and leaves the artifact uncommitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StageIdentity
    run: RunConfig
    inputs: dict[str, ArtifactRef]
    portion: Portion | None = None


def open_store(run: RunConfig) -> ArtifactStore:
    """The run's artifact store."""
    return ArtifactStore(root=run.storage.root, scratch=run.storage.scratch)


def find(run: RunConfig, identity: StageIdentity) -> ArtifactRef | None:
    """A stage's artifact, where it is there and intact."""
    return open_store(run).find(identity.kind, identity.digest)


def of_teacher(output: str, name: str) -> str:
    """The name of a stage's artifact that is about one of several teachers."""
    return output if name == "teacher" else f"{output}_{name}"


def run_of_teacher(run: RunConfig, name: str) -> RunConfig:
    """The run as one of its teachers has it: with that one as its own."""
    if not isinstance(run.algorithm, MultiTeacherConfig) or name == "teacher":
        return run
    teacher = run.algorithm.teachers[name].teacher
    return run.model_copy(update={"teacher": teacher, "algorithm": VanillaKDConfig()})


def made_of(run: RunConfig, side: str) -> PretrainedModel | GgufModel:
    """The model that a side's is made of: of a student that a stage makes, the teacher's mostly."""
    model = run.teacher.model if side == "teacher" else run.student.model
    if isinstance(model, NewVocabularyModel):
        return model.of or run.teacher.model
    return run.teacher.model if isinstance(model, LayerDropModel) else model


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


def commit_artifact(
    store: ArtifactStore,
    identity: StageIdentity,
    *,
    files: Sequence[FileRecord],
    counts: Mapping[str, int],
    info: Mapping[str, Any],
    seconds: float,
) -> ArtifactRef:
    """Write the manifest of what has this identity."""
    return store.commit(
        kind=identity.kind,
        digest=identity.digest,
        code_version=identity.code_version,
        config=identity.config,
        inputs=identity.inputs,
        files=files,
        counts=counts,
        info=info,
        seconds=seconds,
    )


def publish_workdir(
    store: ArtifactStore,
    identity: StageIdentity,
    *,
    counts: Mapping[str, int],
    info: Mapping[str, Any],
    seconds: float,
) -> ArtifactRef:
    """Move the working folder's files into the artifact, then write its manifest."""
    folder = store.workdir(identity.kind, identity.digest)
    files = store.publish(identity.kind, identity.digest, folder)
    return commit_artifact(store, identity, files=files, counts=counts, info=info, seconds=seconds)
