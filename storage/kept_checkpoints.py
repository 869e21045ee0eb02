"""Checkpoints of a training, kept in the store: where the machine that wrote them is lost, another
one goes on from them; and the last one of a training that is done, for one that takes it up.

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

    def put(
        self, checkpoint: Path, names: Sequence[str], records: Mapping[str, Path] | None
    ) -> None:
        """Copy files of a checkpoint's folder; and small files that belong to it, by their paths
        where they are fetched to.
        """
        target = f"{self._root}/{checkpoint.name}"
        if records is not None:
            self._store.write_whole(f"{target}/{RECORDS}", _tar(records))
        for name in names:
            with disk_errors(f"{target}/{name}"):
                self._store.put_file(checkpoint / name, f"{target}/{name}")

    def complete(self, checkpoint: str, *, keep: Collection[str]) -> None:
        """From now on a checkpoint counts, and of all others those to `keep`."""
        self._store.write_whole(f"{self._root}/{checkpoint}/{COMPLETE}", b"")
        for name in self._folders().keys() - {checkpoint, *keep}:
            self._store.remove_tree(f"{self._root}/{name}")

    def files(self) -> dict[str, set[str]]:
        """The names of the files of each checkpoint that is complete, by its own."""
        found = self._folders().items()
        return {name: files - {COMPLETE, RECORDS} for name, files in found if COMPLETE in files}

    def fetch(self, checkpoint: str, files: Collection[str], target: Path) -> None:
        """Copy a checkpoint of these files to a local folder, which appears when all are there."""
        partial = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in sorted(files):
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


def _tar(files: Mapping[str, Path]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, path in files.items():
            tar.add(path, name)
    return content.getvalue()
