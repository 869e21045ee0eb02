"""Looking after a store: what is in it, whether it is whole, and what nothing refers to."""

import json
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import xxhash

from storage.artifact import FileRecord, Manifest
from storage.digest import BLOCK_BYTES
from storage.errors import ArtifactMissingError, StoreCorruptError, StoreError
from storage.kept_checkpoints import FOLDER, KeptCheckpoints
from storage.lease import forget_leases, held_leases, is_held, lease_name
from storage.promoted import all_promoted
from storage.runs import list_runs
from storage.store import MANIFEST, ArtifactStore


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An artifact's folder. `manifest` is None for an unfinished or damaged one, `state` says
    which; `num_bytes` is what the files take, `own_bytes` what no other artifact takes as well,
    `modified` when the last was written (seconds since the epoch; 0 where the file system does not
    say).
    """

    kind: str
    digest: str
    manifest: Manifest | None
    state: str
    num_bytes: int
    own_bytes: int
    modified: float
    files: dict[str, int]
    runs: tuple[str, ...]

    @property
    def name(self) -> str:
        """How the commands call it."""
        return f"{self.kind}/{self.digest}"


def entries(store: ArtifactStore) -> list[Entry]:
    """Everything under `artifacts/`, the newest first."""
    users: dict[str, list[str]] = {}
    for run in list_runs(store):
        for name in run.artifacts.values():
            users.setdefault(name, []).append(run.id)
    for own in all_promoted(store):
        for name in (own.student, own.evaluation):
            users.setdefault(name, []).append(f"{own.name} (promoted)")
    root = f"{store.root}/artifacts"
    found = [
        _entry(store, name, files, users.get(name, []))
        for name, files in _named(store, root).items()
    ]
    return sorted(found, key=lambda entry: (-entry.modified, entry.name))


def _named(store: ArtifactStore, root: str) -> dict[str, dict[str, dict[str, object]]]:
    """What the file system says of each file in `<root>/<kind>/<digest>/`, by both names."""
    folders: dict[str, dict[str, dict[str, object]]] = {}
    store.fs.invalidate_cache(root)
    if not store.fs.exists(root):
        return folders
    for path, info in store.fs.find(root, detail=True).items():
        parts = path[len(root) + 1 :].split("/", 2)
        if len(parts) == 3:
            folders.setdefault(f"{parts[0]}/{parts[1]}", {})[parts[2]] = info
    return folders


def _entry(
    store: ArtifactStore, name: str, files: dict[str, dict[str, object]], runs: list[str]
) -> Entry:
    kind, digest = name.split("/")
    manifest, state, sizes = None, "unfinished", _sizes(files)
    if MANIFEST in files:
        try:
            manifest, state = store.manifest(kind, digest), "finished"
        except (StoreCorruptError, ArtifactMissingError) as error:
            state = str(error)
    return Entry(
        kind=kind,
        digest=digest,
        manifest=manifest,
        state=state,
        num_bytes=sum(sizes.values()),
        own_bytes=sum(size for path, size in sizes.items() if not _is_shared(files[path])),
        modified=max(map(_modified, files.values())),
        files=sizes,
        runs=tuple(runs),
    )


def _sizes(files: dict[str, dict[str, object]]) -> dict[str, int]:
    return {path: int(str(info["size"])) for path, info in files.items()}


def _is_shared(info: dict[str, object]) -> bool:
    """Whether a file of a disk is another artifact's as well; see `ArtifactStore.link`."""
    return int(str(info.get("nlink", 1))) > 1


def _modified(info: dict[str, object]) -> float:
    """File systems name it differently."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def find_entry(store: ArtifactStore, name: str) -> Entry:
    """The artifact of which `name` is the digest's beginning, with or without `kind/`.

    Raises StoreError when there is none, or more than one.
    """
    matches = [e for e in entries(store) if _is_called(e, name)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise StoreError(f"no artifact '{name}' in {store.root}; `kdflow store ls` lists them")
    names = ", ".join(e.name[: len(e.kind) + 13] for e in matches[:5])
    raise StoreError(f"'{name}' is the beginning of {len(matches)} artifacts: {names}; say more")


def _is_called(entry: Entry, name: str) -> bool:
    return entry.name.startswith(name) if "/" in name else entry.digest.startswith(name)


def damages(store: ArtifactStore, entry: Entry) -> Iterator[tuple[FileRecord, str]]:
    """Read every file of a finished artifact; those that are not as recorded, and how."""
    assert entry.manifest is not None
    folder = store.folder(entry.kind, entry.digest)
    for record in entry.manifest.files:
        size = entry.files.get(record.path)
        if size is None:
            yield record, "is gone"
        elif size != record.num_bytes:
            yield record, f"has {size} bytes, recorded were {record.num_bytes}"
        elif _hash(store, f"{folder}/{record.path}") != record.xxh3:
            yield record, "does not have its checksum"


def _hash(store: ArtifactStore, path: str) -> str:
    hasher = xxhash.xxh3_128()
    with store.fs.open(path, "rb", block_size=BLOCK_BYTES) as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def remove_damaged(store: ArtifactStore, entry: Entry, damaged: list[FileRecord]) -> None:
    """Take back the manifest and remove the damaged files: the next run computes them again, and
    of hidden states nothing else.
    """
    store.retract(entry.kind, entry.digest)
    for record in damaged:
        store.remove(f"{store.folder(entry.kind, entry.digest)}/{record.path}")


def remove_artifact(store: ArtifactStore, entry: Entry) -> None:
    """Remove an artifact, its manifest first, and its checkpoints. Raises StoreError while somebody
    computes it.
    """
    if is_held(store, lease_name(entry.kind, entry.digest)):
        raise StoreError(f"{entry.name} is being computed; end that run first")
    store.retract(entry.kind, entry.digest)
    store.remove_tree(store.folder(entry.kind, entry.digest))
    KeptCheckpoints(store, entry.kind, entry.digest).remove()
    forget_leases(store, lease_name(entry.kind, entry.digest))


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Something that can be removed: an artifact's `entry`, or a file or folder at `path`, which is
    one of the store's, or local in its scratch.
    """

    what: str
    why: str
    num_bytes: int
    path: str
    entry: Entry | None = None
    in_scratch: bool = False
    is_folder: bool = False


def find_garbage(store: ArtifactStore, *, older_than_s: float) -> list[Garbage]:
    """What no manifest and no run refers to, and was not touched for `older_than_s` seconds."""
    now = time.time()
    garbage: list[Garbage] = []
    known, held = entries(store), held_leases(store)
    for entry in known:
        if now - entry.modified < older_than_s:
            continue
        if _is_at_work(held, entry.kind, entry.digest):
            continue
        if entry.manifest is None:
            why = "it never finished" if entry.state == "unfinished" else entry.state
        elif not entry.runs:
            why = "no run refers to it"
        else:
            garbage += _strays(store, entry)
            continue
        folder = store.folder(entry.kind, entry.digest)
        garbage.append(
            Garbage(what=entry.name, why=why, num_bytes=entry.own_bytes, path=folder, entry=entry)
        )
    finals = {
        entry.name
        for entry in known
        if entry.manifest is not None and entry.manifest.info.get("final_checkpoint")
    }
    garbage += _kept_checkpoints(store, held, finals, now - older_than_s)
    return [*garbage, *_scratch_garbage(store, known, now - older_than_s)]


def _is_at_work(held: Collection[str], kind: str, digest: str) -> bool:
    """Whether somebody computes an artifact, or a portion of it."""
    return any(name.startswith(lease_name(kind, digest)) for name in held)


def _kept_checkpoints(
    store: ArtifactStore, held: Collection[str], finals: Collection[str], before: float
) -> Iterator[Garbage]:
    """Checkpoints of trainings that nobody goes on with, or that have ended and are not among the
    `finals`, whose last one is kept.
    """
    root = f"{store.root}/{FOLDER}"
    for name, files in _named(store, root).items():
        at_work = _is_at_work(held, *name.split("/"))
        if at_work or name in finals or max(map(_modified, files.values())) > before:
            continue
        yield Garbage(
            what=f"{FOLDER}/{name}",
            why="checkpoints of a training that nobody goes on with",
            num_bytes=sum(_sizes(files).values()),
            path=f"{root}/{name}",
            is_folder=True,
        )


def _strays(store: ArtifactStore, entry: Entry) -> Iterator[Garbage]:
    """Files of a finished artifact that its manifest does not list."""
    assert entry.manifest is not None
    listed = {record.path for record in entry.manifest.files} | {MANIFEST}
    folder = store.folder(entry.kind, entry.digest)
    for path, size in entry.files.items():
        if path not in listed:
            yield Garbage(
                what=f"{entry.name}/{path}",
                why="its manifest does not list it",
                num_bytes=size,
                path=f"{folder}/{path}",
            )


def _scratch_garbage(store: ArtifactStore, known: list[Entry], before: float) -> Iterator[Garbage]:
    """Working folders of what is finished, and copies of what is gone."""
    finished = {entry.name for entry in known if entry.manifest is not None}
    kinds = {entry.kind for entry in known}
    for path in sorted(store.scratch.glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.is_dir() and path.parent.name in kinds and name in finished:
            yield from _local(path, "its artifact is finished", before)
    for copies in ("copies", "read-cache"):
        for path in sorted((store.scratch / copies).glob("*/*")):
            if f"{path.parent.name}/{path.name}" not in finished:
                yield from _local(path, "a copy of what is not in the store", before)


def _local(path: Path, why: str, before: float) -> Iterator[Garbage]:
    stats = [p.stat() for p in path.rglob("*") if p.is_file()]
    if all(stat.st_mtime < before for stat in stats):
        size = sum(stat.st_size for stat in stats)
        yield Garbage(what=str(path), why=why, num_bytes=size, path=str(path), in_scratch=True)


def remove_garbage(store: ArtifactStore, garbage: Garbage) -> None:
    """Remove it."""
    if garbage.in_scratch:
        shutil.rmtree(garbage.path)
    elif garbage.entry is not None:
        remove_artifact(store, garbage.entry)
    elif garbage.is_folder:
        store.remove_tree(garbage.path)
    else:
        store.remove(garbage.path)


def manifest_text(manifest: Manifest) -> str:
    """A manifest without its list of files, as JSON to be read by people."""
    return json.dumps(manifest.model_dump(mode="json", exclude={"files"}), indent=2)
