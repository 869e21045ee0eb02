"""Weights on their way from one process to another of this machine, in shared memory.

Dimensions: B bytes of a bucket.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdflow_core.anonymous_file import AnonymousFile

ALIGNMENT = 64
NAMED = 3  # parameters that an error names


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
        """The tensors by name: views of the file, valid until it is written to again."""
        return [(place.name, view) for place, view in self.views()]

    def views(self) -> Iterator[tuple[TensorPlace, torch.Tensor]]:
        """Each tensor's place, and the tensor."""
        whole_B = self.whole()
        for place in self.tensors:
            part_B = whole_B[place.offset : place.offset + place.num_bytes]
            yield place, part_B.view(place.torch_dtype).view(place.shape)

    def whole(self) -> torch.Tensor:
        """The bytes of the file: uint8 [B]."""
        return torch.from_file(self.path, shared=True, size=self.num_bytes, dtype=torch.uint8)


class BucketFile:
    """A file for one bucket after another, of memory that is free again when this process ends,
    however it does. Another process of the user opens it by its `path`.
    """

    def __init__(self) -> None:
        self._file = AnonymousFile("kdflow-weights")
        self._size = 0

    def write(self, named: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
        """Copy tensors, of whatever device, into it."""
        places, end = [], 0
        for name, tensor in named:
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = TensorPlace(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=end)
            places.append(place)
            end += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
        bucket = self._bucket(end, tuple(places))
        for (_, view), (_, tensor) in zip(bucket.views(), named, strict=True):
            view.copy_(tensor)
        return bucket

    def room_for(self, other: Bucket) -> Bucket:
        """A bucket in it for the tensors of one elsewhere, whose bytes are to come."""
        return self._bucket(other.num_bytes, other.tensors)

    def _bucket(self, num_bytes: int, tensors: tuple[TensorPlace, ...]) -> Bucket:
        if num_bytes > self._size:  # it only grows: the pages of the last bucket serve on
            os.truncate(self._file.fd, num_bytes)
            self._size = num_bytes
        return Bucket(path=self._file.path, num_bytes=num_bytes, tensors=tensors)


def missing_text(names: Sequence[str]) -> str:
    """The error about weights that have not arrived."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"new weights of {', '.join(names[:NAMED])}{more} did not arrive"
