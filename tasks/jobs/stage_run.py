"""A stage at work: what all jobs share. Loads no model library."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from configs.schema.models import PretrainedModel
from kdflow_core.errors import WorkerError
from kdflow_core.models.folders import context_length, resolve_folder
from kdflow_core.sinks import Reporter
from kdflow_core.workers.base import RankContext
from storage.artifact import ArtifactRef, FileRecord
from storage.store import ArtifactStore
from storage.tokens import TokenTable
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import (
    StageSpec,
    commit_artifact,
    made_of,
    open_store,
    spec_of_teacher,
)
from tasks.stages.slices import SPLITS, Side, Split

SIDES: tuple[Side, ...] = ("student", "teacher")
R = TypeVar("R")


class StageRun:
    """A stage at work: its spec, store and reporter, its place among the ranks, and the commit at
    its end.
    """

    def __init__(
        self, spec: StageSpec, reporter: Reporter, context: RankContext | None = None
    ) -> None:
        self.spec = spec
        self.run = spec.run
        self.reporter = reporter
        self.context = context or RankContext()
        self.store: ArtifactStore = open_store(spec.run)
        self.kind = spec.identity.kind
        self.digest = spec.identity.digest
        self._started = time.perf_counter()

    @property
    def workdir(self) -> Path:
        """The stage's local working folder; it survives a crash."""
        return self.store.workdir(self.kind, self.digest)

    def commit(
        self, *, files: Sequence[FileRecord], counts: Mapping[str, int], info: Mapping[str, Any]
    ) -> ArtifactRef:
        """Write the manifest."""
        return commit_artifact(
            self.store,
            self.spec.identity,
            files=files,
            counts=counts,
            info=info,
            seconds=time.perf_counter() - self._started,
        )

    def publish(self, *, counts: Mapping[str, int], info: Mapping[str, Any]) -> ArtifactRef:
        """Move the working folder's files into the artifact, then commit."""
        files = self.store.publish(self.kind, self.digest, self.workdir)
        return self.commit(files=files, counts=counts, info=info)

    def model_folder(self, side: Side) -> Path:
        """The local folder of the teacher's or the (untrained) student's model."""
        prepared = self.spec.inputs.get(f"{side}_model")
        if prepared is not None:
            return self.store.local_copy(prepared)
        model = self.run.teacher.model if side == "teacher" else self.run.student.model
        assert isinstance(model, PretrainedModel)
        return resolve_folder(model.path, model.revision)

    def trusts(self, side: Side) -> bool:
        """Whether Python files that a side's model brings along may run."""
        return made_of(self.run, side).trust_remote_code

    @cached_property
    def length_limit(self) -> int:
        """The longest text that the run allows and both models hold, in tokens."""
        own = (context_length(self.model_folder(side)) for side in SIDES)
        return min(self.run.data.max_length, *own)

    def tables(self) -> dict[Split, TokenTable]:
        """The token tables by split, with the answers in place that a model wrote."""
        name = "answers" if "answers" in self.spec.inputs else "tokens"
        folder = self.store.local_copy(self.spec.inputs[name])
        return {split: TokenTable(folder / f"{split}.arrow") for split in SPLITS}

    def of_teacher(self, name: str) -> "StageRun":
        """This stage as one of several teachers has it: with its model and its states."""
        return StageRun(spec_of_teacher(self.spec, name), self.reporter, self.context)


def refuse_foreign(spec: StageSpec, *stages: str) -> None:
    """Raises WorkerError for a spec that is not of one of these stages, or whose artifact is made
    in rounds: a job would publish something else under its name.
    """
    identity = spec.identity
    stage = CATALOGUE.get(identity.stage)
    if stage is None or identity.stage not in stages or identity.kind != stage.kind:
        raise WorkerError(
            f"the job of {' and '.join(stages)} was given a spec of stage '{identity.stage}' that "
            f"makes {identity.kind}"
        )
    if identity.code_version != stage.code_version:
        raise WorkerError(
            f"a spec of {identity.kind} by code version {identity.code_version}, and this is "
            f"{stage.code_version}: launcher and ranks run different programs"
        )
    if stage.in_rounds(spec.run):
        raise WorkerError(
            f"in a run with mode={spec.run.mode} rounds make the {identity.kind}, not the job of "
            f"stage {identity.stage}"
        )


def job(*stages: str) -> Callable[[Callable[[StageRun], R]], Callable[[StageRun], R]]:
    """Mark a function as the job of these stages; it refuses the spec of any other."""

    def decorate(work: Callable[[StageRun], R]) -> Callable[[StageRun], R]:
        @functools.wraps(work)
        def checked(stage: StageRun) -> R:
            refuse_foreign(stage.spec, *stages)
            return work(stage)

        return checked

    return decorate
