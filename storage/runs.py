"""Which runs use which artifacts: one small record per run, written when it starts."""

from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from storage.digest import digest
from storage.errors import StoreError, StoreFullError
from storage.records import read_records
from storage.store import ArtifactStore

FOLDER = "runs"


class RunRecord(BaseModel):
    """A run's name, when it was first started, and its artifacts as `kind/digest` by stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    created_at: str
    artifacts: dict[str, str]

    @property
    def id(self) -> str:
        """The name and a part of the digest of the artifacts: the same run has the same id."""
        return run_id(self.name, self.artifacts)


def run_id(name: str, artifacts: Mapping[str, str]) -> str:
    """How commands call the run of a name with these artifacts."""
    return f"{name}-{digest(dict(artifacts))[:8]}"


def record_run(store: ArtifactStore, name: str, artifacts: Mapping[str, str]) -> None:
    """Note that a run uses these artifacts, unless it is known or the store is read-only."""
    run = RunRecord(
        name=name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        artifacts=dict(artifacts),
    )
    try:
        store.create(_path(store, run.id), run.model_dump_json(indent=1).encode())
    except StoreFullError:
        raise
    except StoreError:
        return  # read-only: a run that needs nothing new may use it all the same


def list_runs(store: ArtifactStore) -> list[RunRecord]:
    """All readable records, newest first."""
    found = read_records(store, FOLDER, RunRecord)
    return sorted(found, key=lambda run: run.created_at, reverse=True)


def forget_run(store: ArtifactStore, run: RunRecord) -> None:
    """Remove a run's record; its artifacts stay until `gc`."""
    store.remove(_path(store, run.id))


def _path(store: ArtifactStore, run_id: str) -> str:
    return f"{store.root}/{FOLDER}/{run_id}.json"
