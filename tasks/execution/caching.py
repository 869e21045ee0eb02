"""Prefect's cache, keyed by our content digests, trusted only when the artifact is intact."""

from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from configs.secrets import public
from storage.artifact import ArtifactRef
from storage.digest import digest
from tasks.stages.identity import StageSpec, find


class StageCachePolicy(CachePolicy):
    """The key is the artifact's kind and digest, and the store it is in."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,  # noqa: ARG002 - Prefect's signature
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - Prefect's signature
        **kwargs: Any,  # noqa: ARG002 - Prefect's signature
    ) -> str:
        """The cache key of a stage task, whose one argument is its StageSpec."""
        spec: StageSpec = inputs["spec"]
        store = digest(public(spec.run.storage.root))[:8]
        return f"{spec.identity.kind}-{spec.identity.digest}-{store}"


def run_cached(
    task: "Task[..., ArtifactRef]", spec: StageSpec, *others: Any, valid: bool | None = None
) -> ArtifactRef:
    """Call a task with its spec, which the cache goes by, and what `others` it takes. Prefect never
    looks whether a cached artifact still exists; we do, and refresh the cache when it does not,
    or where the caller knows that it is not `valid`.

    Results lie beside the store's working files, so a new Prefect home does not make them cold.
    """
    if valid is None:
        valid = find(spec.run, spec.identity) is not None
    return task.with_options(
        refresh_cache=not valid,
        result_storage=Path(spec.run.storage.scratch).absolute() / "prefect-results",
        task_run_name=f"{task.name}-{spec.identity.digest[:8]}",
    )(spec, *others)
