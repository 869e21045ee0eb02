"""One artifact as one tar file, to carry it to another store."""

import io
import re
import tarfile
from pathlib import Path

import fsspec
import xxhash

from storage.artifact import ArtifactRef, Manifest
from storage.digest import BLOCK_BYTES
from storage.errors import StoreError
from storage.lease import exclusive, lease_name
from storage.maintenance import Entry
from storage.store import MANIFEST, ArtifactStore, disk_errors

NAME = re.compile(r"[a-z][a-z0-9_-]*/[0-9a-f]{32}")


def export_artifact(store: ArtifactStore, entry: Entry, target: str) -> None:
    """Write a finished artifact to a tar file (a path or an fsspec URL), the manifest first."""
    if entry.manifest is None:
        raise StoreError(f"{entry.name} is not finished ({entry.state}); only whole ones travel")
    folder = store.folder(entry.kind, entry.digest)
    content = entry.manifest.to_bytes()
    with (
        disk_errors(target),
        fsspec.open(target, "wb") as sink,
        tarfile.open(fileobj=sink, mode="w|") as tar,
    ):
        header = tarfile.TarInfo(MANIFEST)
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
        for record in entry.manifest.files:
            header = tarfile.TarInfo(record.path)
            header.size = record.num_bytes
            with store.fs.open(f"{folder}/{record.path}", "rb") as file:
                tar.addfile(header, file)


def import_artifact(store: ArtifactStore, source: str) -> ArtifactRef:
    """Read an exported artifact into the store; every checksum is compared, the manifest comes
    last. One that is there and whole stays as it is.

    Raises StoreError when the file is not an export, or not as it was written.
    """
    with fsspec.open(source, "rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                return _import(store, source, tar)
        except tarfile.TarError as error:
            raise StoreError(f"{source} is not an exported artifact: {error}") from error


def _import(store: ArtifactStore, source: str, tar: tarfile.TarFile) -> ArtifactRef:
    manifest = _read_manifest(source, tar)
    kind, digest = manifest.kind, manifest.digest
    expected = {record.path: record for record in manifest.files}
    with exclusive(store, lease_name(kind, digest), lambda _: None):
        there = store.find(kind, digest)
        if there is not None:
            return there
        store.retract(kind, digest)
        folder = store.folder(kind, digest)
        while (member := tar.next()) is not None:
            record = expected.pop(member.name, None)
            if record is None:
                raise StoreError(f"{source} holds {member.name}, which its manifest does not list")
            path = f"{folder}/{record.path}"
            found = _copy(store, tar, member, path)
            if found != (record.num_bytes, record.xxh3):
                store.remove(path)
                raise StoreError(f"{record.path} in {source} does not have its checksum")
        if expected:
            raise StoreError(f"{source} is cut off: it lacks {', '.join(sorted(expected)[:3])}")
        store.write_whole(f"{folder}/{MANIFEST}", manifest.to_bytes())
    return store.ref(manifest)


def _read_manifest(source: str, tar: tarfile.TarFile) -> Manifest:
    first = tar.next()
    file = None if first is None or first.name != MANIFEST else tar.extractfile(first)
    if file is None:
        raise StoreError(f"{source} is not an exported artifact: it does not begin with a manifest")
    try:
        manifest = Manifest.from_bytes(file.read())
    except ValueError as error:
        raise StoreError(f"the manifest in {source} cannot be used: {error}") from error
    inside = all(
        not path.is_absolute() and ".." not in path.parts
        for path in (Path(record.path) for record in manifest.files)
    )
    if not inside or not NAME.fullmatch(f"{manifest.kind}/{manifest.digest}"):
        raise StoreError(f"the manifest in {source} names files outside of an artifact")
    return manifest


def _copy(
    store: ArtifactStore, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str
) -> tuple[int, str]:
    """Write a member to the store; its size and XXH3-128."""
    file = tar.extractfile(member)
    if file is None:
        raise StoreError(f"{member.name} is no plain file")
    store.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    hasher = xxhash.xxh3_128()
    size = 0
    with disk_errors(path), store.fs.open(path, "wb") as sink:
        while block := file.read(BLOCK_BYTES):
            sink.write(block)
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()
