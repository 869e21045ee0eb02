"""The student's weights, gathered a bucket at a time for whoever serves them.

Every rank takes part; a parameter is gathered once, in the dtype it is served in, and no rank ever
holds more than one bucket of whole ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kdflow_core.weight_buckets import Bucket, BucketFile

FILES = 2  # one is written while the other is read


class WeightPublisher:
    """Buckets of about `bucket_bytes` (one parameter at least) of a model's weights as `dtype`.

    With `checkpoint_names`, names and tensors are those of the model's saved files, which differ
    where transformers has fused them in memory (experts, say).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        checkpoint_names: bool,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._checkpoint_names = checkpoint_names
        # A tied parameter comes once, under its first name.
        sizes = {n: p.numel() * dtype.itemsize for n, p in model.named_parameters()}
        self._buckets = _packed(sizes, bucket_bytes)
        self._files = [BucketFile() for _ in range(FILES)]

    @property
    def num_buckets(self) -> int:
        """How many there are."""
        return len(self._buckets)

    @property
    def num_bytes(self) -> int:
        """What all weights take."""
        return sum(p.numel() for p in self._model.parameters()) * self._dtype.itemsize

    @torch.no_grad()
    def gather(self, number: int) -> list[tuple[str, torch.Tensor]]:
        """A bucket's whole tensors by name; rank 0 gets them, the other ranks only take part."""
        parameters = dict(self._model.named_parameters())
        whole = {n: t for n, t in self._whole(parameters, self._buckets[number]) if _first_rank()}
        if self._checkpoint_names and whole:
            whole = revert_weight_conversion(self._model, whole)
        return list(whole.items())

    def write(self, number: int) -> Bucket | None:
        """A bucket in a file, on rank 0. The file is that of the bucket before the last one."""
        named = self.gather(number)
        if not _first_rank():
            return None
        return self._files[number % FILES].write(named)

    def broadcast(self, number: int, group: Any) -> None:
        """Send a bucket to the other ranks of `group`, which rank 0 has joined."""
        for _, tensor in self.gather(number):
            dist.broadcast(tensor.contiguous(), src=0, group=group)

    def describe(self, number: int) -> list[dict[str, Any]]:
        """Names, dtypes and shapes of a bucket, as `broadcast` sends it."""
        parameters = dict(self._model.named_parameters())
        meta = {
            name: torch.empty(parameters[name].shape, dtype=self._dtype, device="meta")
            for name in self._buckets[number]
        }
        if self._checkpoint_names:
            meta = revert_weight_conversion(self._model, meta)
        dtype = str(self._dtype).removeprefix("torch.")
        return [{"name": n, "dtype": dtype, "shape": list(t.shape)} for n, t in meta.items()]

    def _whole(
        self, parameters: dict[str, torch.nn.Parameter], names: Sequence[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = parameters[name].detach().to(self._dtype)  # the shards, before they travel
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _packed(sizes: dict[str, int], budget: int) -> list[list[str]]:
    """Names in order, in runs of at most `budget` bytes."""
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not buckets or size > room:
            buckets.append([])
            room = budget
        buckets[-1].append(name)
        room -= size
    return buckets


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
