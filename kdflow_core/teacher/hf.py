"""The teacher in Hugging Face transformers: the reference engine, on any device.

Dimensions: B sequences of a batch, T tokens, N supervised tokens, R rows of the output (B * T),
H hidden size.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from configs.schema.teacher import TransformersTeacher
from kdflow_core.batching import batch_by_tokens, pad_right
from kdflow_core.contracts import HiddenRows, OutputHead, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.families.base import batched_length
from kdflow_core.models.folders import text_config
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.heads import verify_head
from kdflow_core.models.loading import DTYPES, load_causal_lm
from kdflow_core.models.offload import OffloadedModule
from kdflow_core.teacher import longest_allowed


class TransformersTeacherEngine:
    """Runs the model without its head, once `head` is seen to rebuild its logits."""

    remark = ""

    def __init__(
        self,
        config: TransformersTeacher,
        *,
        folder: Path,
        head: OutputHead,
        longest: int,  # noqa: ARG002 - an engine without a pool needs no sizes beforehand
        device: torch.device,
    ) -> None:
        model = load_causal_lm(
            folder,
            dtype=DTYPES[config.dtype],
            attention=config.attention,
            device=device,
            trust_remote_code=config.model.trust_remote_code,
        )
        verify_head(model, head)
        self._model: torch.nn.Module | None = model.base_model
        self._offload = OffloadedModule(model.base_model)
        self._device = device
        self._tokens_per_batch = config.tokens_per_batch
        self._batched_length = batched_length(text_config(folder))
        self.max_length = longest_allowed(config, folder)

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `TeacherEngine`; the budget bounds the padded area."""
        return batch_by_tokens(lengths, self._tokens_per_batch, self._batched_length)

    @torch.no_grad()
    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        """See `TeacherEngine`."""
        if self._model is None:
            raise ModelError("the teacher engine is closed")
        ids_BT = pad_right([s.ids_T for s in sequences]).to(self._device)
        hidden_BTH = post_norm_states(self._model, ids_BT)
        buffer_RH = hidden_BTH.to(torch.bfloat16).flatten(0, 1)
        width = ids_BT.shape[1]
        return [
            HiddenRows(
                buffer_RH=buffer_RH,
                # The state before a supervised token predicts it.
                index_N=torch.from_numpy(row * width + s.target_positions_N - 1).to(self._device),
            )
            for row, s in enumerate(sequences)
        ]

    def sleep(self) -> None:
        """See `TeacherEngine`."""
        self._offload.sleep()

    def wake(self) -> None:
        """See `TeacherEngine`."""
        self._offload.wake()

    def close(self) -> None:
        """See `TeacherEngine`."""
        self._model = None
        self._offload.close()
