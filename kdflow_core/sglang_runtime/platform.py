"""SGLang on a CPU without AMX kernels: every fused layer takes its plain PyTorch path."""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Text models on any CPU that PyTorch runs on."""

    _enum = PlatformEnum.OOT

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
        """SGLang's own pool."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: PLC0415 - cyclic

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own allocator."""
        from sglang.srt.mem_cache.allocator import (  # noqa: PLC0415 - cyclic
            PagedTokenToKVPoolAllocator,
        )

        return PagedTokenToKVPoolAllocator  # type: ignore[no-any-return]
