"""Where a training keeps checkpoints: in a folder outside the store, seen by its ranks and its
launcher; and, if so asked, copies in the store, of which the last one may stay when it is done.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kdflow_core.student.seal import METADATA, damage_of
from storage.errors import StoreCorruptError, StoreError
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


class FinalCheckpoint:
    """The last checkpoint of a training that is done, in the store. Raises OSError or StoreError
    where that cannot be read or written.
    """

    def __init__(self, store: ArtifactStore, student: str) -> None:
        self._kept = KeptCheckpoints(store, *student.split("/"))
        self._student = student

    def keep(self, folder: Path) -> None:
        """Put it there, whole, and what belongs to it, from a training's checkpoints."""
        checkpoint = folder / _saved(folder)[-1]
        names = sorted(path.name for path in checkpoint.iterdir())
        self._kept.put(checkpoint, names, _records(folder))
        self._kept.complete(checkpoint.name, keep=())

    @property
    def is_there(self) -> bool:
        """Whether there is one."""
        return bool(self._kept.files())

    def fetch(self, folder: Path, tell: Callable[[str], None]) -> None:
        """Have it be the first checkpoint of another training."""
        kept = self._kept.files()
        if not kept:
            raise StoreError(f"the last checkpoint of {self._student} is not in the store any more")
        name = max(kept)
        step = int(name.removeprefix(STEP))
        tell(f"going on with the training of {self._student}, of which {step} steps are done")
        self._kept.fetch_records(name, folder.parent)
        self._kept.fetch(name, kept[name], folder / name)
        damage = damage_of(folder / name)
        if damage is not None:
            shutil.rmtree(folder / name)
            raise StoreCorruptError(
                f"the last checkpoint of {self._student} is damaged: {damage}; train that student "
                "again, or begin anew with student.start=fresh"
            )


class StoredCopies:
    """Copies of a training's checkpoints in the store. See `CheckpointCopies`.

    A store that cannot be written costs the copies, not the training.
    """

    def __init__(self, store: ArtifactStore, identity: StageIdentity) -> None:
        self._kept = KeptCheckpoints(store, identity.kind, identity.digest)
        self._folder = checkpoints_folder(store, identity)

    def put(self, checkpoint: Path, names: Sequence[str]) -> str | None:
        """See `CheckpointCopies`."""
        # Rank 0's, as all of these are.
        records = _records(self._folder) if METADATA in names else None
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


def _records(folder: Path) -> dict[str, Path]:
    """What belongs to the checkpoints in a folder, by its place in the working folder."""
    work = folder.parent
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
    copies, student = stored_copies(spec), spec.run.student.continues
    if copies is not None:
        copies.fetch(tell)
    if student is None or spec.identity.stage != "train":
        return
    store = open_store(spec.run)
    folder = checkpoints_folder(store, spec.identity)
    if not _saved(folder):
        FinalCheckpoint(store, student).fetch(folder, tell)
