"""Weights that leave the device and come back: whoever refers to the parameters still does."""

from collections import defaultdict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Shared:
    """The tensors over one storage, and the storage's bytes in host memory."""

    tensors: tuple[torch.Tensor, ...]
    host: torch.Tensor


class OffloadedModule:
    """Parameters and buffers of a frozen module, which can sleep in host memory (pinned, where
    there is a CUDA device). Tensors that share storage go on sharing it.

    The host copy is made at the first sleep and kept, so later sleeps copy nothing, until the
    weights have `changed`.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module: torch.nn.Module | None = module
        self._shared: list[_Shared] = []
        self._places: dict[int, tuple[torch.device, int, torch.Size, tuple[int, ...]]] = {}
        self._asleep = False
        self._is_current = False

    def changed(self) -> None:
        """The weights have other values now."""
        self._is_current = False

    def sleep(self) -> None:
        """Free the device memory. Nothing to do when asleep."""
        if self._asleep or self._module is None:
            return
        if not self._is_current:
            self._shared = []  # not beside the new copy
            self._shared, self._is_current = self._copy_out(self._module), True
        for shared in self._shared:
            for tensor in shared.tensors:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._asleep = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Bring the weights back. Nothing to do when awake."""
        if not self._asleep:
            return
        for shared in self._shared:
            device = self._places[id(shared.tensors[0])][0]
            # A copy on the CPU too: the host's own must not be written to.
            storage = shared.host.to(device, copy=True, non_blocking=True).untyped_storage()
            for tensor in shared.tensors:
                _, offset, size, stride = self._places[id(tensor)]
                empty = torch.empty(0, dtype=tensor.dtype, device=device)
                tensor.data = empty.set_(storage, offset, size, stride)
        self._asleep = False
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """Let go of module and copies."""
        self._module, self._shared, self._asleep = None, [], False

    def _copy_out(self, module: torch.nn.Module) -> list[_Shared]:
        by_storage: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.numel():
                by_storage[tensor.untyped_storage().data_ptr()].append(tensor)
                place = (tensor.device, int(tensor.storage_offset()), tensor.shape, tensor.stride())
                self._places[id(tensor)] = place
        return [_Shared(tuple(tensors), _host_copy(tensors[0])) for tensors in by_storage.values()]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's whole storage."""
    storage = tensor.untyped_storage()
    pinned = tensor.device.type == "cuda"
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    host.untyped_storage().copy_(storage)
    return host
