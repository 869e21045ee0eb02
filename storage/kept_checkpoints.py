"""Checkpoints of a training that is not done, kept in the store: where the machine that wrote them
is lost, another one goes on from them.

`<root>/checkpoints/<kind>/<digest>/step-<8 digits>/`, where `complete` comes last. What is in the
other files, and whether they are whole, is known to who wrote them.
"""

import io
import shutil
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from storage.store import ArtifactStore, disk_errors

FOLDER = "checkpoints"
COMPLETE = "complete"
RECORDS = "records.tar"


class KeptCheckpoints:
    """Those of one artifact that is being made. Raises OSError or StoreError where the store cannot
    be read or written.
    """

    def __init__(self, store: ArtifactStore, kind: str, digest: str) -> None:
        self._store = store
        self._root = f"{store.root}/{FOLDER}/{kind}/{digest}"

    def put(self, checkpoint: Path, names: Sequence[str]) -> None:
        """Copy files of a checkpoint's folder."""
        target = f"{self._root}/{checkpoint.name}"
        for name in names:
            path = f"{target}/{name}"
            with disk_errors(path):
                self._store.fs.makedirs(target, exist_ok=True)
                self._store.fs.put_file(str(checkpoint / name), path)

    def put_records(self, checkpoint: str, files: Mapping[str, Path]) -> None:
        """Add small files that belong to a checkpoint, by their paths where it is fetched to."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name, path in files.items():
                tar.add(path, name)
        self._store.write_whole(f"{self._root}/{checkpoint}/{RECORDS}", content.getvalue())

    def complete(self, checkpoint: str, *, keep: Collection[str]) -> None:
        """From now on a checkpoint counts, and of all others those to `keep`."""
        self._store.write_whole(f"{self._root}/{checkpoint}/{COMPLETE}", b"")
        for name in self._folders():
            if name not in keep and name != checkpoint:
                self._store.remove_tree(f"{self._root}/{name}")

    def names(self) -> list[str]:
        """The checkpoints that are complete, in their order."""
        return sorted(name for name, files in self._folders().items() if COMPLETE in files)

    def fetch(self, checkpoint: str, target: Path) -> None:
        """Copy a checkpoint to a local folder, which appears when all is there."""
        partial = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in sorted(self._folders()[checkpoint] - {COMPLETE, RECORDS}):
            with disk_errors(str(partial)):
                self._store.fs.get_file(f"{self._root}/{checkpoint}/{name}", str(partial / name))
        partial.rename(target)

    def fetch_records(self, checkpoint: str, target: Path) -> None:
        """Copy what belongs to a checkpoint into a local folder."""
        content = self._store.fs.cat_file(f"{self._root}/{checkpoint}/{RECORDS}")
        with disk_errors(str(target)), tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(target, filter="data")

    def remove(self) -> None:
        """Remove them all."""
        self._store.remove_tree(self._root)

    def _folders(self) -> dict[str, set[str]]:
        """The names of the files of each checkpoint, by its own."""
        found: dict[str, set[str]] = {}
        for path in self._store.sizes(self._root):
            checkpoint, _, name = path.partition("/")
            found.setdefault(checkpoint, set()).add(name)
        return found
