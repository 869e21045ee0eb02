"""The teacher in Hugging Face transformers: the reference engine, on any device.

Dimensions: B rows of a batch, T tokens, N supervised tokens, R rows of the output (B * T), H hidden
size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from configs.schema.teacher import TransformersTeacher
from kdflow_core.contracts import HiddenRows, OutputHead, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.folders import text_config
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.heads import verify_head
from kdflow_core.models.loading import DTYPES, load_causal_lm, load_config
from kdflow_core.models.offload import OffloadedModule
from kdflow_core.models.packing import PACKED, lay_out, model_division
from kdflow_core.teacher import longest_allowed
from kdflow_core.uploads import upload


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
        trusts = config.model.trust_remote_code
        self._division = model_division(
            load_config(folder, trust_remote_code=trusts),
            text_config(folder),
            tokens=config.tokens_per_batch,
            packing="auto",
            attention=config.attention,
            trust_remote_code=trusts,
        )
        model = load_causal_lm(
            folder,
            dtype=DTYPES[config.dtype],
            attention=PACKED if self._division.packed else config.attention,
            device=device,
            trust_remote_code=trusts,
        )
        verify_head(model, head)
        self._model: torch.nn.Module | None = model.base_model
        self._offload = OffloadedModule(model.base_model)
        self._device = device
        self.max_length = longest_allowed(config, folder)

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `TeacherEngine`; the budget bounds the area, of padding too where there is any."""
        return self._division.batches(np.asarray(lengths, np.int64))

    @torch.no_grad()
    def forward(self, sequences: Sequence[TokenSequence]) -> list[HiddenRows]:
        """See `TeacherEngine`."""
        if self._model is None:
            raise ModelError("the teacher engine is closed")
        ids_BT, packed = lay_out([s.ids_T for s in sequences], packed=self._division.packed)
        if packed is None:
            begins = np.arange(len(sequences)) * ids_BT.shape[1]
        else:
            begins = packed.edges[:-1].astype(np.int64)
        hidden_BTH = post_norm_states(self._model, upload(ids_BT, self._device), packed)
        buffer_RH = hidden_BTH.to(torch.bfloat16).flatten(0, 1)
        return [
            HiddenRows(
                buffer_RH=buffer_RH,
                # The state before a supervised token predicts it.
                index_N=upload(torch.from_numpy(begin + s.target_positions_N - 1), self._device),
            )
            for begin, s in zip(begins, sequences, strict=True)
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
