"""The teacher in SGLang, inside this process: its output buffer is handed on by reference.

Dimensions: R tokens of a batch, back to back, H hidden size, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.schema.teacher import SglangTeacher
from kdflow_core.batching import pack_by_tokens
from kdflow_core.contracts import HiddenRows, OutputHead, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import text_config
from kdflow_core.models.heads import apply_head
from kdflow_core.models.offload import OffloadedModule
from kdflow_core.sglang_runtime.versions import require_sglang
from kdflow_core.teacher import longest_allowed
from kdflow_core.teacher.activations import activation_bytes, static_fraction

if TYPE_CHECKING:
    from kdflow_core.sglang_runtime.in_process import PrefillRunner

MAX_SEQUENCES = 256
CPU_FRACTION = 0.8  # what it is of matters little: the cache is capped by its tokens
LARGEST_PAGE = 128  # of SGLang's caches, in tokens


class SglangTeacherEngine:
    """One copy of the model over consecutive ranks of the world, each of which gets all states."""

    remark = ""

    def __init__(
        self,
        config: SglangTeacher,
        *,
        folder: Path,
        head: OutputHead,
        longest: int,
        device: torch.device,
    ) -> None:
        require_sglang()
        if config.expert_parallel > 1 and device.type == "cpu":
            raise ModelError(
                "SGLang computes experts on a CPU with all of them in each rank; set "
                "teacher.expert_parallel=1 (teacher.tensor_parallel splits each expert)"
            )
        self.max_length = longest_allowed(config, folder)
        # Without a kernel that sees to it, only a batch of one does not depend on its company.
        alone = config.deterministic and device.type == "cpu"
        self._tokens_per_batch = 1 if alone else config.tokens_per_batch
        self._runner: PrefillRunner | None = _start(config, folder, longest, device)
        self._offload = OffloadedModule(self._runner.model)
        try:
            self._verify_head(head)
        except BaseException:
            self.close()
            raise
        self._runner.drop_logits()

    def _verify_head(self, head: OutputHead) -> None:
        assert self._runner is not None
        size = head.weight_VH.shape[0]
        rng = np.random.default_rng(0)
        states_RH, own_V = self._runner.logits_of_last_rows([rng.integers(0, size, 8)])
        own_V = own_V[0, :size].float().cpu()
        rebuilt_V = apply_head(states_RH[-1:].cpu(), head)[0]
        error = ((rebuilt_V - own_V).norm() / own_V.norm()).item()
        if not error < 0.02:  # see models.heads.verify_head
            raise ModelError(
                "logits rebuilt from the hidden states that SGLang gives differ from the model's "
                f"own (relative error {error:.3g}); set teacher.type=transformers"
            )

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `TeacherEngine`; sequences lie back to back, and each fills whole pages of the
        cache.
        """
        if self._runner is None:
            raise ModelError("the teacher engine is closed")
        page = self._runner.page_size
        return pack_by_tokens(
            [_whole(int(length), page) for length in lengths],
            self._tokens_per_batch,
            max_sequences=MAX_SEQUENCES,
        )

    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        """See `TeacherEngine`."""
        if self._runner is None:
            raise ModelError("the teacher engine is closed")
        buffer_RH = self._runner.states([s.ids_T for s in sequences]).to(torch.bfloat16)
        begins = np.cumsum([0, *(len(s.ids_T) for s in sequences[:-1])])
        return [
            HiddenRows(
                buffer_RH=buffer_RH,
                # The state before a supervised token predicts it.
                index_N=torch.from_numpy(begin + s.target_positions_N - 1).to(buffer_RH.device),
            )
            for begin, s in zip(begins, sequences, strict=True)
        ]

    def sleep(self) -> None:
        """See `TeacherEngine`. The cache of one batch stays on the device."""
        self._offload.sleep()

    def wake(self) -> None:
        """See `TeacherEngine`."""
        self._offload.wake()

    def close(self) -> None:
        """See `TeacherEngine`."""
        if self._runner is not None:
            self._offload.close()
            self._runner.close()
            self._runner = None


def _whole(tokens: int, page: int) -> int:
    return -(-tokens // page) * page


def _memory_fraction(
    config: SglangTeacher, folder: Path, max_tokens: int, device: torch.device
) -> float:
    if config.memory_fraction is not None:
        return config.memory_fraction
    if device.type == "cpu":
        return CPU_FRACTION
    free_bytes, _ = torch.cuda.mem_get_info(device)
    itemsize: int = getattr(torch, config.dtype).itemsize
    activations = activation_bytes(text_config(folder), tokens=max_tokens, itemsize=itemsize)
    return static_fraction(free_bytes=free_bytes, activations=activations)


def _start(
    config: SglangTeacher, folder: Path, longest: int, device: torch.device
) -> "PrefillRunner":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels that other hardware has
        from kdflow_core.sglang_runtime.in_process import (  # noqa: PLC0415 - takes 10 s
            PrefillRunner,
            RunnerOptions,
        )
    max_tokens = _whole(max(config.tokens_per_batch, longest), LARGEST_PAGE)
    return PrefillRunner(
        RunnerOptions(
            folder=folder,
            trust_remote_code=config.model.trust_remote_code,
            dtype=config.dtype,
            tensor_parallel=config.tensor_parallel,
            expert_parallel=config.expert_parallel,
            pipeline_parallel=config.pipeline_parallel,
            quantization=config.quantization,
            attention_backend=config.attention_backend,
            memory_fraction=_memory_fraction(config, folder, max_tokens, device),
            context_length=config.context_length,
            deterministic=config.deterministic,
            max_tokens=max_tokens,
            max_sequences=MAX_SEQUENCES,
        ),
        device,
    )
