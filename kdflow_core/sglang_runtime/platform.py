"""SGLang on a CPU without AMX kernels: every fused layer takes its plain PyTorch path."""

import sys
from importlib import import_module
from typing import Any, NoReturn

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Text models on any CPU that PyTorch runs on."""

    _enum = PlatformEnum.OOT

    def init_backend(self) -> None:
        """SGLang calls it while `model_runner` is loaded, in each process that runs a model.

        On a CPU that module rounds the width of feed-forward layers up to the blocks of Intel's
        kernels. The plain path has no blocks, and nothing would be written into the rest.
        """
        runner = sys.modules["sglang.srt.model_executor.model_runner"]
        runner.adjust_config_with_unaligned_cpu_tp = _as_it_is  # type: ignore[attr-defined]

    def is_pin_memory_available(self, device: Any = None) -> bool:  # noqa: ARG002 - SGLang's signature
        """False: there is no device to pin memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """PyTorch's scaled dot-product attention."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """The suffix of the `forward_*` methods to take."""
        return "native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool (0.5.21)."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: PLC0415 - cyclic

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_kv_pool_cls(self, *, kind: str) -> type | None:  # noqa: ARG002 - SGLang's signature
        """SGLang's own pools (0.5.23)."""
        return None

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own allocator."""
        from sglang.srt.mem_cache.allocator import (  # noqa: PLC0415 - cyclic
            PagedTokenToKVPoolAllocator,
        )

        return PagedTokenToKVPoolAllocator  # type: ignore[no-any-return]


def _as_it_is(model_config: Any, load_config: Any, tp_size: int) -> Any:  # noqa: ARG001 - SGLang's signature
    return model_config


def leave_nccl_out() -> None:
    """Join ranks without NCCL, also where torch is a CUDA build. For processes that run on a CPU,
    before their groups are made.
    """
    nccl = import_module("sglang.srt.distributed.device_communicators.pynccl")
    nccl.NCCLLibrary = _no_nccl  # type: ignore[attr-defined]


def _no_nccl(*_: Any) -> NoReturn:
    raise OSError("there is no GPU here for NCCL")
