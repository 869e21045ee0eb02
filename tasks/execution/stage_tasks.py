"""One thin Prefect task per stage: a spec in, an artifact reference out."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger

from kdflow_core.errors import WorkerError
from storage.artifact import ArtifactRef
from tasks.execution.caching import StageCachePolicy
from tasks.execution.launch import launch_share, launch_stage
from tasks.execution.progress_artifact import ProgressArtifact
from tasks.presentation.results import artifact_key
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import Portion, StageSpec, find

P = ParamSpec("P")


def died_unexpectedly(_task: "Task[..., Any]", _run: TaskRun, state: State[Any]) -> bool:
    """Retry what a second attempt can mend: a worker that died, not an input that is wrong."""
    return isinstance(state.data, WorkerError) and not state.data.expected


def _run(spec: StageSpec) -> ArtifactRef:
    name = spec.identity.name
    bar = ProgressArtifact(artifact_key(f"{spec.run.name}-{name}"), f"Stage {name}")
    return launch_stage(spec, get_run_logger(), bar.show)


def cached_task(
    name: str, description: str, *, retries: int = 1
) -> Callable[[Callable[P, ArtifactRef]], "Task[P, ArtifactRef]"]:
    """A task whose first argument is the spec that its cache goes by."""
    return task(
        name=name,
        description=description,
        cache_policy=StageCachePolicy(),
        persist_result=True,
        result_serializer="json",
        retries=retries,
        retry_condition_fn=died_unexpectedly,
    )


@task(
    name="extract-portion",
    description="A portion of the teacher's hidden states",
    cache_policy=NO_CACHE,  # what it has stored is the cache
    retries=1,
    retry_condition_fn=died_unexpectedly,
)
def extract_portion(spec: StageSpec) -> None:
    """Compute the shards of one portion; the stage itself commits them."""
    launch_share(spec, get_run_logger())


def share_out(spec: StageSpec) -> None:
    """Map a stage's work over as many tasks as the catalogue says, unless its artifact is there."""
    portions = CATALOGUE[spec.identity.stage].portions(spec.run)
    if portions == 1 or find(spec.run, spec.identity) is not None:
        return
    specs = [
        spec.model_copy(update={"portion": Portion(number=k, of=portions)}) for k in range(portions)
    ]
    futures = extract_portion.map(specs)
    futures.wait()  # all of them: what one has computed is kept when another fails
    futures.result()


STAGE_TASKS: Mapping[str, "Task[[StageSpec], ArtifactRef]"] = MappingProxyType(
    {name: cached_task(name, stage.description)(_run) for name, stage in CATALOGUE.items()}
)
