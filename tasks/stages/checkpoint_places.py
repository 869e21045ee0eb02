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
    names = _saved(checkpoints_folder(store, identity))
    return int(names[-1].removeprefix(STEP)) if names else 0


def _saved(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder, in the order of their steps."""
    return sorted(path.name for path in folder.glob(f"{STEP}????????"))


class StoredCopies:
    """Copies of a training's checkpoints in the store. See `CheckpointCopies`.

    A store that cannot be written costs the copies, not the training.
    """

    def __init__(self, store: ArtifactStore, identity: StageIdentity) -> None:
        self._kept = KeptCheckpoints(store, identity.kind, identity.digest)
        self._folder = checkpoints_folder(store, identity)

    def put(self, checkpoint: Path, names: Sequence[str]) -> str | None:
        """See `CheckpointCopies`."""
        records = self._records() if METADATA in names else None  # rank 0's, as all of these are
        return _problem(lambda: self._kept.put(checkpoint, names, records))

    def complete(self, checkpoint: Path) -> str | None:
        """See `CheckpointCopies`."""
        return _problem(lambda: self._kept.complete(checkpoint.name, keep=_saved(self._folder)))

    def fetch(self, tell: Callable[[str], None]) -> None:
        """Bring here those that are newer than the newest one here, and what belongs to them.
        Raises OSError or StoreError.
        """
        kept, here = self._kept.files(), _saved(self._folder)
        newest = max(kept, default="")
        if newest <= max(here, default=""):
            return
        tell(f"going on from a checkpoint in the store, {newest}: copying it to {self._folder}")
        self._kept.fetch_records(newest, self._folder.parent)
        for name in sorted(kept.keys() - here):
            self._kept.fetch(name, kept[name], self._folder / name)

    def remove(self) -> str | None:
        """Remove them; what has gone wrong with it."""
        return _problem(self._kept.remove)

    def _records(self) -> dict[str, Path]:
        work = self._folder.parent
        found = [path for pattern in RECORDS for path in sorted(work.glob(pattern))]
        return {path.relative_to(work).as_posix(): path for path in found}


def _problem(work: Callable[[], None]) -> str | None:
    """What has gone wrong in the store, in words."""
    try:
        work()
    except (OSError, StoreError) as error:
        return str(error)
    return None


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
