"""The artifact store: `<root>/artifacts/<kind>/<digest>/` over fsspec, manifest last.

A stage writes its files into the artifact's folder in any order, resuming what an earlier attempt
left there, and then commits. No manifest, no artifact: readers never see a half-written one.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from configs.secrets import public
from storage.artifact import ArtifactRef, FileRecord, Manifest
from storage.digest import hash_file
from storage.errors import ArtifactMissingError, StoreCorruptError, StoreError, StoreFullError
from storage.fingerprint import Fingerprints
from storage.remote import RemoteFileSystem

MANIFEST = "manifest.json"
ROWS_FOLDER = "states.zarr/"
REPAIR = "`kdflow store verify --repair` removes what is damaged, the next run computes it again"
NO_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EXDEV}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
PRODUCERS = ("torch", "transformers", "datasets", "zarr", "prefect", "kdflow")


class ArtifactStore:
    """Finished artifacts under `root` (a folder or fsspec URL), working files under `scratch`."""

    def __init__(self, *, root: str, scratch: str) -> None:
        try:
            fs, path = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:
            raise StoreError(f"storage.root={root}: {error}") from error
        self.is_local = isinstance(fs, LocalFileSystem)
        self.fs: Any = fs if self.is_local else RemoteFileSystem(fs)
        self.root = path.rstrip("/")
        self.scratch = Path(scratch).absolute()
        self._prints = Fingerprints(self.scratch)

    def folder(self, kind: str, digest: str) -> str:
        """The artifact's folder, as a path of `self.fs`."""
        return f"{self.root}/artifacts/{kind}/{digest}"

    def uri(self, kind: str, digest: str) -> str:
        """The artifact's folder, as a path or URL that anyone can open."""
        path = self.folder(kind, digest)
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def workdir(self, kind: str, digest: str) -> Path:
        """A local folder for the files of an unfinished stage; it survives a crash."""
        path = self.scratch / kind / digest
        path.mkdir(parents=True, exist_ok=True)
        return path

    def manifest(self, kind: str, digest: str) -> Manifest:
        """Read a manifest. Raises ArtifactMissingError, or StoreCorruptError if unreadable."""
        path = f"{self.folder(kind, digest)}/{MANIFEST}"
        try:
            content = self.fs.cat_file(path)
        except FileNotFoundError as error:
            raise ArtifactMissingError(f"no artifact {kind}/{digest} in {self.root}") from error
        try:
            return Manifest.from_bytes(content)
        except ValueError as error:
            raise StoreCorruptError(f"{path} is not a manifest: {error}") from error

    def newest_manifests(self, kind: str, most: int) -> list[Manifest]:
        """Up to `most` readable manifests of a kind, the newest first; of the others only the names
        are read. A remote store does not say which are the newest, so any may be given.
        """
        folder = f"{self.root}/artifacts/{kind}"
        paths = [f"{folder}/{name}/{MANIFEST}" for name in self.list_names(folder)]
        if self.is_local:
            written = {path: _written(path) for path in paths}
            paths = sorted(paths, key=lambda path: written[path], reverse=True)
        found = []
        for content in self.read_many(paths[:most]).values():
            with suppress(ValueError):  # of another schema, or damaged: nothing to compare with
                found.append(Manifest.from_bytes(content))
        return sorted(found, key=lambda item: item.created_at, reverse=True)

    def find(self, kind: str, digest: str) -> ArtifactRef | None:
        """The reference of an intact artifact, else None."""
        return None if self.why_absent(kind, digest) else self.ref(self.manifest(kind, digest))

    def find_named(self, name: str) -> ArtifactRef | None:
        """The same of an artifact by its `kind/digest`."""
        kind, _, digest = name.partition("/")
        return self.find(kind, digest)

    def why_absent(self, kind: str, digest: str) -> str | None:
        """None if the artifact is intact, else what is wrong: no manifest, a file's size, or its
        content. A local file is read once, and again when its inode has changed; the rows of states
        have checksums of their own, which their reader compares.
        """
        try:
            manifest = self.manifest(kind, digest)
        except ArtifactMissingError:
            return "never finished"
        except StoreCorruptError as error:
            return str(error)
        folder = self.folder(kind, digest)
        sizes = self.sizes(folder)
        for record in manifest.files:
            size = sizes.get(record.path)
            if size is None:
                return f"file {record.path} is gone"
            if size != record.num_bytes:
                return f"file {record.path} has {size} bytes, recorded were {record.num_bytes}"
            read = self.is_local and not record.path.startswith(ROWS_FOLDER)
            if read and not self._is_whole(Path(folder) / record.path, record):
                return f"file {record.path} does not have its checksum"
        return None

    def _is_whole(self, path: Path, record: FileRecord) -> bool:
        """Whether a local file has the recorded content."""
        try:
            return self._prints.file(path) == record.xxh3
        except FileNotFoundError:
            return False

    def sizes(self, folder: str) -> dict[str, int]:
        """The size in bytes of every file below a folder, by its path relative to it."""
        self.fs.invalidate_cache(folder)
        try:
            found = self.fs.find(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {path[len(folder) + 1 :]: int(entry["size"]) for path, entry in found.items()}

    def list_names(self, folder: str) -> list[str]:
        """The names of what lies directly in a folder of `self.fs`; none where there is none."""
        self.fs.invalidate_cache(folder)
        try:
            found = self.fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[1] for path in found]

    def ref(self, manifest: Manifest) -> ArtifactRef:
        """The reference to a finished artifact."""
        return ArtifactRef(
            kind=manifest.kind,
            digest=manifest.digest,
            uri=self.uri(manifest.kind, manifest.digest),
            num_bytes=manifest.num_bytes,
            counts=manifest.counts,
        )

    def retract(self, kind: str, digest: str) -> None:
        """Remove the manifest, so that nobody reads the artifact while it is being mended."""
        path = f"{self.folder(kind, digest)}/{MANIFEST}"
        if self.fs.exists(path):
            self.fs.rm_file(path)

    def publish(self, kind: str, digest: str, local_folder: Path) -> list[FileRecord]:
        """Make a local folder the artifact's folder; what was there before goes.

        Returns the records of its files, for the commit.
        """
        records = [
            file_record(path, path.relative_to(local_folder).as_posix())
            for path in sorted(local_folder.rglob("*"))
            if path.is_file()
        ]
        target = self.folder(kind, digest)
        with disk_errors(target):
            self.remove_tree(target)
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(local_folder, target)
                return records
            self.fs.makedirs(target, exist_ok=True)
            for record in records:
                self.put_file(local_folder / record.path, f"{target}/{record.path}")
        shutil.rmtree(local_folder)
        return records

    def commit(
        self,
        *,
        kind: str,
        digest: str,
        code_version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        files: Sequence[FileRecord],
        counts: Mapping[str, int],
        info: Mapping[str, Any],
        seconds: float,
    ) -> ArtifactRef:
        """Write the manifest: now the artifact exists."""
        manifest = Manifest(
            kind=kind,
            digest=digest,
            code_version=code_version,
            config=dict(config),
            inputs=dict(inputs),
            files=tuple(files),
            counts=dict(counts),
            info=public(dict(info)),
            seconds=seconds,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            versions={name: version(name) for name in PRODUCERS},
        )
        self.write_whole(f"{self.folder(kind, digest)}/{MANIFEST}", manifest.to_bytes())
        return self.ref(manifest)

    def write_whole(self, path: str, content: bytes) -> None:
        """Write a file of `self.fs` so that readers see all of it or nothing."""
        with disk_errors(path):
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if not self.is_local:
                self.fs.pipe_file(path, content)  # an object store shows an object only when whole
                return
            temporary = _write_temporary(path, content)
            os.replace(temporary, path)
            _sync_folder(path)

    def put_file(self, local: Path, path: str) -> None:
        """Copy a local file to one of `self.fs`."""
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.fs.put_file(str(local), path)

    def create(self, path: str, content: bytes) -> bool:
        """Write a file of `self.fs` whole unless there is one; False when there is.

        Of several at once one succeeds, on local disks and on object stores with conditional
        writes (S3 is one).
        """
        with disk_errors(path):
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if not self.is_local:
                try:
                    self.fs.pipe_file(path, content, mode="create")
                except FileExistsError:
                    return False
                return True
            temporary = _write_temporary(path, content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            _sync_folder(path)
            return True

    def link(self, source: str, path: str) -> bool:
        """Give a file of `self.fs` a second name, which stays when the first goes; an object store
        copies it by itself. One that has the name already keeps it. False where the source is gone,
        or the file system gives no second names.
        """
        with disk_errors(path):
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            try:
                if self.is_local:
                    os.link(source, path)
                elif not self.fs.exists(path):
                    self.fs.cp_file(source, path)
            except FileExistsError:
                return True
            except FileNotFoundError:
                return False
            except OSError as error:
                if not self.is_local or error.errno not in NO_LINKS:
                    raise
                return False
        return True

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The contents of files by path; one that is not there is left out."""
        if not paths:
            return {}
        # `cat` would take a path for a pattern.
        found = self.fs.cat_ranges(list(paths), None, None, on_error="return")
        contents = {}
        for path, content in zip(paths, found, strict=True):
            if isinstance(content, bytes):
                contents[path] = content
            elif not isinstance(content, FileNotFoundError):
                raise content
        return contents

    def remove(self, path: str) -> None:
        """Remove a file that may be gone already."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)

    def remove_tree(self, folder: str) -> None:
        """Remove a folder that may be gone already. What is below it is named, not a pattern."""
        if self.is_local:
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
            return
        self.fs.invalidate_cache(folder)
        paths = self.fs.find(folder)
        if any(sign in folder for sign in "*?["):  # `rm` would take the paths for patterns
            for path in paths:
                self.remove(path)
        elif paths:
            self.fs.rm(paths)

    def local_copy(self, ref: ArtifactRef) -> Path:
        """A local folder with the artifact's files; remote ones are downloaded once.

        Raises StoreCorruptError for files that are not as they were written.
        """
        folder = self.folder(ref.kind, ref.digest)
        if self.is_local:
            if (wrong := self.why_absent(ref.kind, ref.digest)) is not None:
                raise StoreCorruptError(f"{folder}: {wrong}; {REPAIR}")
            return Path(folder)
        target = self.scratch / "copies" / ref.kind / ref.digest
        for record in self.manifest(ref.kind, ref.digest).files:
            path = target / record.path
            if not self._is_whole(path, record):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
                with disk_errors(str(target)):
                    self.fs.get_file(f"{folder}/{record.path}", str(partial))
                if hash_file(partial) != record.xxh3:
                    partial.unlink()
                    raise StoreCorruptError(
                        f"{folder}/{record.path} does not have its checksum; {REPAIR}"
                    )
                os.replace(partial, path)
        return target

    def free_bytes(self) -> int | None:
        """What a local disk has room for; None for a remote store, which does not say."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def require_room(self, num_bytes: int, what: str) -> None:
        """Refuse, before work starts, what will not fit a local disk. Raises StoreFullError."""
        free = self.free_bytes()
        if free is not None and num_bytes > free:
            raise StoreFullError(
                f"{what} needs {num_bytes / 1e9:.3f} GB, but {self.root} has {free / 1e9:.3f} GB "
                "free; point storage.root to a larger disk, set storage.codec to a smaller one, "
                "lower data.max_samples, or set storage.check_room=false to go on all the same"
            )


def file_record(path: Path, name: str) -> FileRecord:
    """The record of a local file under another name."""
    return FileRecord(path=name, num_bytes=path.stat().st_size, xxh3=hash_file(path))


def _written(path: str) -> float:
    """When a local file was written; 0 when there is none."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _write_temporary(path: str, content: bytes) -> str:
    """A file beside `path` with the content, safe on the disk."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _sync_folder(path: str) -> None:
    """Make a new name safe on the disk."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn a full disk into a StoreFullError, a read-only one into a StoreError; both name the
    place.
    """
    try:
        yield
    except OSError as error:
        if error.errno in READ_ONLY:
            raise StoreError(
                f"{path} cannot be written ({os.strerror(error.errno or 0)}); finished artifacts "
                "can be read from there, for new ones set storage.root to a place of your own"
            ) from error
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise StoreFullError(
            f"no room left while writing {path} ({os.strerror(error.errno)}); what is finished "
            "stays: make room or set storage.root to a larger disk, and run again"
        ) from error
