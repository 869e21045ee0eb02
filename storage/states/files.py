"""The files of a store of hidden states: their names, and how each is created and read."""

import numpy as np
import pyarrow as pa
import xxhash

from storage.artifact import FileRecord
from storage.codecs import codec_named
from storage.errors import StoreCorruptError
from storage.states.layout import Layout
from storage.states.shard_file import ShardFile
from storage.store import ArtifactStore

INDEX = "index.arrow"
FITTED = "states.zarr/fitted/c/0"


def hidden_file(shard: int) -> str:
    """The name of a shard's rows."""
    return f"states.zarr/hidden/c/{shard}/0/0/0"


def targets_file(shard: int) -> str:
    """The name of a shard's target ids."""
    return f"states.zarr/target_ids/c/{shard}/0"


def commit_file(shard: int) -> str:
    """The name of a shard's commit."""
    return f"commits/{shard:06d}.json"


class StateFiles:
    """Access to one artifact's files, by names relative to its folder."""

    def __init__(self, store: ArtifactStore, kind: str, digest: str) -> None:
        self.store = store
        self._folder = store.folder(kind, digest)

    def sizes(self) -> dict[str, int]:
        """The size of every file there is, in bytes."""
        return self.store.sizes(self._folder)

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """The contents of files; one that is not there is left out."""
        paths = {f"{self._folder}/{name}": name for name in names}
        found = self.store.read_many(list(paths))
        return {paths[path]: content for path, content in found.items()}

    def create(self, name: str, content: bytes) -> bytes:
        """Create a file. When there is one already, it stays; returns what is in it."""
        path = f"{self._folder}/{name}"
        if self.store.create(path, content):
            return content
        return bytes(self.store.fs.cat_file(path))

    def create_as(self, name: str, content: bytes) -> None:
        """Create a file whose content follows from the plan; one with another is replaced."""
        if self.create(name, content) != content:
            self.remove(name)
            self.create(name, content)

    def take(self, other: "StateFiles", theirs: str, name: str) -> bool:
        """Have a file of another artifact as one's own, see `ArtifactStore.link`."""
        return self.store.link(f"{other._folder}/{theirs}", f"{self._folder}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole, over what there is."""
        self.store.write_whole(f"{self._folder}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""
        self.store.remove(f"{self._folder}/{name}")


def record(name: str, content: bytes) -> FileRecord:
    """A file's entry in a commit and in the manifest."""
    checksum = xxhash.xxh3_128_hexdigest(content)
    return FileRecord(path=name, num_bytes=len(content), xxh3=checksum)


def read_index(content: bytes | np.ndarray) -> pa.RecordBatch | None:
    """The index from its bytes; None where they are not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
    except (pa.ArrowInvalid, OSError):
        return None


def read_hidden(content: np.ndarray, layout: Layout, *, title: str) -> ShardFile:
    """The rows of a shard [1 or 2, R, W] from the bytes of its file."""
    codec = codec_named(layout.codec)
    return ShardFile(
        content,
        title=title,
        planes=codec.planes,
        chunks_of_shard=layout.shard_rows // layout.chunk_rows,
        chunk_shape=(layout.chunk_rows, codec.width(layout.hidden_size)),
        dtype=codec.dtype,
        compressed=codec.compressed,
    )


def read_targets(content: np.ndarray, layout: Layout, *, title: str) -> ShardFile:
    """The target ids of a shard [1, R] from the bytes of its file."""
    return ShardFile(
        content,
        title=title,
        planes=1,
        chunks_of_shard=layout.shard_rows // layout.chunk_rows,
        chunk_shape=(layout.chunk_rows,),
        dtype=np.dtype("<i4"),
        compressed=False,
    )


def read_fitted(content: bytes, layout: Layout) -> np.ndarray:
    """What a lossy codec has fixed: float32 [H]."""
    fitted_H = np.frombuffer(content, "<f4")
    if len(fitted_H) != layout.hidden_size:
        raise StoreCorruptError(f"{FITTED} holds {len(fitted_H)} scales for {layout.hidden_size}")
    if not (np.isfinite(fitted_H) & (fitted_H > 0)).all():
        raise StoreCorruptError(f"{FITTED} holds scales that are not positive numbers")
    return fitted_H


def hash_rows(stored_PNW: np.ndarray) -> int:
    """XXH3-64 over the bytes of stored rows, plane by plane."""
    hasher = xxhash.xxh3_64()
    for plane_NW in stored_PNW:
        hasher.update(np.ascontiguousarray(plane_NW).data)
    return hasher.intdigest()
