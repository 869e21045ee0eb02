"""Weights on their way from one process to another of this machine: files in shared memory."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """A tensor's name, dtype and shape, and where in the bucket it begins, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Some tensors in a file of `num_bytes`; it goes between processes as plain values."""

    path: str
    num_bytes: int
    tensors: tuple[TensorPlace, ...]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Bucket":
        """From what `dataclasses.asdict` and JSON have made of it."""
        tensors = tuple(TensorPlace(**{**t, "shape": tuple(t["shape"])}) for t in plain["tensors"])
        return cls(path=plain["path"], num_bytes=plain["num_bytes"], tensors=tensors)

    def open(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors by name: views of the file, valid until the next bucket is written to it."""
        return [(place.name, view) for place, view in self._views()]

    def _views(self) -> Iterator[tuple[TensorPlace, torch.Tensor]]:
        whole = torch.from_file(self.path, shared=True, size=self.num_bytes, dtype=torch.uint8)
        for place in self.tensors:
            part = whole[place.offset : place.offset + place.num_bytes]
            yield place, part.view(place.torch_dtype).view(place.shape)


def write_bucket(path: Path, named: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    """Copy tensors, of whatever device, into a file."""
    places, end = [], 0
    for name, tensor in named:
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = TensorPlace(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=end)
        places.append(place)
        end += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
    bucket = Bucket(path=str(path), num_bytes=max(end, 1), tensors=tuple(places))
    with path.open("ab") as file:
        if file.tell() < bucket.num_bytes:  # it only grows: the pages of the last bucket serve on
            file.truncate(bucket.num_bytes)
    for (_, view), (_, tensor) in zip(bucket._views(), named, strict=True):
        view.copy_(tensor)
    return bucket


@contextmanager
def bucket_folder(num_bytes: int) -> Iterator[Path]:
    """A folder for buckets of `num_bytes` in all, gone afterwards: in shared memory where that has
    room (a container's often has 64 MB), else among temporary files, which the page cache holds.
    """
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > num_bytes
    place = SHARED_MEMORY if roomy else None
    with tempfile.TemporaryDirectory(prefix="kdflow-weights-", dir=place) as folder:
        yield Path(folder)
