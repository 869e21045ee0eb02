"""The runs of a store that have come to their end, and what came of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from storage.artifact import ArtifactRef
from storage.promoted import promoted
from storage.runs import RunRecord, list_runs
from storage.store import ArtifactStore
from tasks.presentation.results import read_evaluation

STUDENT = "student after"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run, its artifacts by stage, its config, and the held-out scores of its student over all
    sources. `seconds` is what its stages took, whenever that was.
    """

    record: RunRecord
    refs: dict[str, ArtifactRef]
    config: dict[str, Any]
    scores: dict[str, Any]
    seconds: float

    @property
    def id(self) -> str:
        """How commands call it."""
        return self.record.id


def finished_runs(store: ArtifactStore) -> list[FinishedRun]:
    """All that have a report, the newest first."""
    found = []
    for record in list_runs(store):
        run = _finished(store, record)
        if run is not None:
            found.append(run)
    return found


def _finished(store: ArtifactStore, record: RunRecord) -> FinishedRun | None:
    refs = {}
    for stage, name in record.artifacts.items():
        ref = store.find_named(name)
        if ref is None:
            return None
        refs[stage] = ref
    if "report" not in refs or "evaluate" not in refs:
        return None
    manifests = {stage: store.manifest(ref.kind, ref.digest) for stage, ref in refs.items()}
    models = read_evaluation(store, refs["evaluate"])["models"]
    return FinishedRun(
        record=record,
        refs=refs,
        config=manifests["report"].config["run"],
        scores=models[STUDENT]["all"],
        seconds=sum(manifest.seconds for manifest in manifests.values()),
    )


def latest_run(store: ArtifactStore, name: str) -> str | None:
    """The id of the run of a name whose student is the promoted one."""
    last = promoted(store, name)
    return None if last is None else last.run


def chosen_runs(store: ArtifactStore, names: Sequence[str]) -> list[FinishedRun]:
    """Runs by their ids, or by their names: the newest of each. Raises ConfigError for what there
    is none of.
    """
    runs, found = finished_runs(store), []
    for name in names:
        fitting = [run for run in runs if name in (run.id, run.record.name)]
        if not fitting:
            known = ", ".join(run.id for run in runs) or "none"
            raise ConfigError(
                f"no finished run '{name}' in {store.root}; there are: {known} (see kdflow history)"
            )
        found.append(fitting[0])
    return found
