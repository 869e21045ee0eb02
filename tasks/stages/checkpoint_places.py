"""Where a stage keeps checkpoints: outside the store, seen by its ranks and its launcher."""

from pathlib import Path

from storage.store import ArtifactStore
from tasks.stages.identity import StageIdentity

STEP = "step-"


def checkpoints_folder(store: ArtifactStore, identity: StageIdentity) -> Path:
    """The checkpoints of a training: a folder that all its ranks share."""
    return store.scratch / identity.kind / identity.digest / "checkpoints"


def newest_checkpoint(store: ArtifactStore, identity: StageIdentity) -> int:
    """The newest step that a checkpoint has; 0 where there is none."""
    found = checkpoints_folder(store, identity).glob(f"{STEP}????????")
    return max((int(path.name.removeprefix(STEP)) for path in found), default=0)
