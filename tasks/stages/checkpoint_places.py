"""Where a training keeps checkpoints: in a folder outside the store, seen by its ranks and its
launcher; and, if so asked, copies in the store.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from kdflow_core.student.seal import METADATA
from storage.errors import StoreError
from storage.kept_checkpoints import KeptCheckpoints
from storage.store import ArtifactStore
from tasks.stages.identity import StageIdentity, StageSpec, open_store

STEP = "step-"
# What else a training goes on from, below its working folder.
RECORDS = ("artifact/*.jsonl", "rounds/*")


def checkpoints_folder(store: ArtifactStore, identity: StageIdentity) -> Path:
    """The checkpoints of a training: a folder that all its ranks share."""
    return store.scratch / identity.kind / identity.digest / "checkpoints"


def newest_checkpoint(store: ArtifactStore, identity: StageIdentity) -> int:
    """The newest step that a checkpoint has; 0 where there is none."""
    found = checkpoints_folder(store, identity).glob(f"{STEP}????????")
    return max((int(path.name.removeprefix(STEP)) for path in found), default=0)


class StoredCopies:
    """Copies of a training's checkpoints in the store. See `CheckpointCopies`.

    A store that cannot be written costs the copies, not the training.
    """

    def __init__(self, store: ArtifactStore, identity: StageIdentity) -> None:
        self._kept = KeptCheckpoints(store, identity.kind, identity.digest)
        self._folder = checkpoints_folder(store, identity)

    def put(self, checkpoint: Path, names: Sequence[str]) -> str | None:
        """See `CheckpointCopies`."""
        try:
            if METADATA in names:  # rank 0's, as all records are
                self._kept.put_records(checkpoint.name, self._records())
            self._kept.put(checkpoint, names)
        except (OSError, StoreError) as error:
            return str(error)
        return None

    def complete(self, checkpoint: Path) -> str | None:
        """See `CheckpointCopies`."""
        try:
            self._kept.complete(checkpoint.name, keep=[p.name for p in self._folder.iterdir()])
        except (OSError, StoreError) as error:
            return str(error)
        return None

    def fetch(self, tell: Callable[[str], None]) -> None:
        """Bring here those that are newer than the newest one here, and what belongs to them.
        Raises OSError or StoreError.
        """
        names = self._kept.names()
        here = [path.name for path in self._folder.glob(f"{STEP}????????")]
        if not names or names[-1] <= max(here, default=""):
            return
        tell(f"going on from a checkpoint in the store, {names[-1]}: copying it to {self._folder}")
        self._kept.fetch_records(names[-1], self._folder.parent)
        for name in names:
            if name not in here:
                self._kept.fetch(name, self._folder / name)

    def remove(self) -> str | None:
        """Remove them; what has gone wrong with it."""
        try:
            self._kept.remove()
        except (OSError, StoreError) as error:
            return str(error)
        return None

    def _records(self) -> dict[str, Path]:
        work = self._folder.parent
        found = [path for pattern in RECORDS for path in sorted(work.glob(pattern))]
        return {path.relative_to(work).as_posix(): path for path in found}


def stored_copies(spec: StageSpec) -> StoredCopies | None:
    """The copies in the store, where the run wants them and the stage has checkpoints."""
    if spec.run.storage.checkpoints == "scratch" or spec.identity.stage != "train":
        return None
    return StoredCopies(open_store(spec.run), spec.identity)


def fetch_checkpoints(spec: StageSpec, tell: Callable[[str], None]) -> None:
    """Before a training's ranks look for checkpoints; for who holds its lease. Raises OSError or
    StoreError.
    """
    copies = stored_copies(spec)
    if copies is not None:
        copies.fetch(tell)
