"""Whether what is stored is as it was written, and what was made of what is not."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdflow_core.student.seal import damage_of
from storage.artifact import FileRecord, Manifest
from storage.digest import hash_file
from storage.errors import ArtifactMissingError, StoreCorruptError
from storage.maintenance import Entry, remove_artifact
from storage.store import ArtifactStore
from tasks.stages.catalogue import ROLLOUTS, ROUND, ROUND_ARTIFACTS

COPIES = ("copies", "read-cache")


def descendants(known: Iterable[Entry], damaged: Iterable[Entry]) -> list[Entry]:
    """The finished artifacts that were made of damaged ones, or of what was made of these.

    Whether they have read the damaged part cannot be told afterwards.
    """
    doubtful, result = list(damaged), []
    rest = [e for e in known if e.manifest is not None and e not in doubtful]
    while doubtful:
        origin = doubtful.pop()
        children = [e for e in rest if _is_made_of(e, origin)]
        rest = [e for e in rest if e not in children]
        doubtful += children
        result += children
    return result


def _is_made_of(entry: Entry, origin: Entry) -> bool:
    if entry.manifest is None:
        return False
    if origin.digest in entry.manifest.inputs.values():
        return True
    return origin.manifest is not None and _is_later_round(entry.manifest, origin.manifest)


def _is_later_round(manifest: Manifest, origin: Manifest) -> bool:
    """Whether an artifact of an on-policy run comes behind a round's, which no input says."""
    if origin.kind not in ROUND_ARTIFACTS:
        return False
    number, whole = _round_and_run(origin)
    if _round_and_run(manifest)[1] != whole:
        return False
    if manifest.kind not in ROUND_ARTIFACTS:
        return True  # the student, which has been through all rounds
    other = _round_and_run(manifest)[0]
    return other > number or (other == number and (origin.kind, manifest.kind) == AFTER)


AFTER = (ROLLOUTS.kind, ROUND.kind)


def _round_and_run(manifest: Manifest) -> tuple[int, tuple[dict[str, Any], dict[str, str]]]:
    config = dict(manifest.config)
    return int(config.pop("round", 0)), (config, manifest.inputs)


def take_back(store: ArtifactStore, entry: Entry) -> None:
    """Have the next run make an artifact again. States are removed at once, as their finished
    shards would be used again; other files stay until then. Raises StoreError while it is computed.
    """
    if entry.kind == "states":
        remove_artifact(store, entry)
    else:
        store.retract(entry.kind, entry.digest)


def scratch_damages(store: ArtifactStore) -> Iterator[tuple[Path, str]]:
    """Checkpoints and copies of artifacts in the scratch folder that are not as they were written,
    and how. Copies of what is not in the store are `gc`'s.
    """
    for path in sorted(store.scratch.glob("*/*/checkpoints/step-????????")):
        if (how := damage_of(path)) is not None:
            yield path, how
    for folder in (path for copies in COPIES for path in (store.scratch / copies).glob("*/*")):
        try:
            manifest = store.manifest(folder.parent.name, folder.name)
        except (ArtifactMissingError, StoreCorruptError):
            continue
        for record in manifest.files:
            path = folder / record.path
            if path.is_file() and not _is_as_recorded(path, record):
                yield path, "is not what the store has"


def _is_as_recorded(path: Path, record: FileRecord) -> bool:
    return path.stat().st_size == record.num_bytes and hash_file(path) == record.xxh3


def remove_from_scratch(path: Path) -> None:
    """Remove a checkpoint or a copy; the one before serves, or it is copied again."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
