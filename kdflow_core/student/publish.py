"""The student's weights, gathered a bucket at a time for whoever serves them.

Every rank takes part; a parameter is gathered once, in the dtype it is served in, and no rank ever
holds more than one bucket of whole ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from kdflow_core.student.lora import served_weights
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
        lora_scale: float = 1.0,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._checkpoint_names = checkpoint_names
        # A tied parameter comes once, under its first name.
        parameters = dict(model.named_parameters())
        self._served = served_weights(parameters, lora_scale)
        self._shapes = {n: parameters[w.parameter].shape for n, w in self._served.items()}
        sizes = {n: shape.numel() * dtype.itemsize for n, shape in self._shapes.items()}
        self._buckets = _packed(sizes, bucket_bytes)
        self._files = [BucketFile() for _ in range(FILES)]

    @property
    def num_buckets(self) -> int:
        """How many there are."""
        return len(self._buckets)

    @property
    def num_bytes(self) -> int:
        """What all weights take."""
        return sum(shape.numel() for shape in self._shapes.values()) * self._dtype.itemsize

    @torch.no_grad()
    def gather(self, number: int) -> list[tuple[str, torch.Tensor]]:
        """A bucket's whole tensors by name; rank 0 gets them, the other ranks only take part."""
        whole = {n: t for n, t in self._whole(self._buckets[number]) if _first_rank()}
        if self._checkpoint_names and whole:
            whole = revert_weight_conversion(self._model, whole)
        return list(whole.items())

    def write(self, number: int) -> Bucket | None:
        """A bucket in a file, on rank 0. The file is that of the bucket before the last one."""
        named = self.gather(number)
        if not _first_rank():
            return None
        return self._files[number % FILES].write(named)

    def broadcast(self, number: int, group: Any, device: torch.device) -> None:
        """Send a bucket from `device` to the other ranks of `group`, which rank 0 has joined."""
        for _, tensor in self.gather(number):
            dist.broadcast(tensor.to(device).contiguous(), src=0, group=group)

    def describe(self, number: int) -> list[dict[str, Any]]:
        """Names, dtypes and shapes of a bucket, as `broadcast` sends it."""
        meta = {
            name: torch.empty(self._shapes[name], dtype=self._dtype, device="meta")
            for name in self._buckets[number]
        }
        if self._checkpoint_names:
            meta = revert_weight_conversion(self._model, meta)
        dtype = str(self._dtype).removeprefix("torch.")
        return [{"name": n, "dtype": dtype, "shape": list(t.shape)} for n, t in meta.items()]

    def _whole(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(self._model.named_parameters())
        for name in names:
            weight = self._served[name]
            # Without an adapter to add, the shards are cast before they travel.
            dtype = self._dtype if weight.a is None else torch.float32
            yield name, weight.value(partial(gathered, parameters, dtype)).to(self._dtype)


def gathered(
    parameters: Mapping[str, torch.nn.Parameter], dtype: torch.dtype, name: str
) -> torch.Tensor:
    """A whole parameter. Every rank takes part."""
    tensor = parameters[name].detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
