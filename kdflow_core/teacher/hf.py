"""The teacher in Hugging Face transformers: the reference engine, on any device.

Dimensions: B sequences of a batch, T tokens, N supervised tokens, H hidden size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from kdflow_core.batching import batch_by_tokens, pad_right
from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import verify_head
from kdflow_core.models.loading import load_causal_lm

WINDOW_BATCHES = 16


class TransformersTeacherEngine:
    """Runs the model without its head, after verifying that `head` rebuilds its logits."""

    def __init__(
        self,
        *,
        folder: Path,
        head: OutputHead,
        dtype: torch.dtype,
        attention: str,
        tokens_per_batch: int,
        max_length: int,
        device: torch.device,
    ) -> None:
        model = load_causal_lm(folder, dtype=dtype, attention=attention, device=device)
        verify_head(model, head)
        self._model: torch.nn.Module | None = model.base_model
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self._max_length = max_length

    def hidden_states(self, sequences: Iterable[TokenSequence]) -> Iterator[torch.Tensor]:
        """See `TeacherEngine`. Batches are formed longest-first within a window of sequences.

        Raises ModelError for a sequence beyond the context length.
        """
        for window in self._windows(sequences):
            longest = max(len(s.ids_T) for s in window)
            if longest > self._max_length:
                raise ModelError(
                    f"a sequence has {longest} tokens, the teacher's context is "
                    f"{self._max_length}; lower data.max_length"
                )
            lengths = [len(s.ids_T) for s in window]
            rows: list[torch.Tensor | None] = [None] * len(window)
            for batch in batch_by_tokens(lengths, self._tokens_per_batch):
                for i, states_NH in zip(batch, self._run([window[i] for i in batch]), strict=True):
                    rows[i] = states_NH
            yield from (states_NH for states_NH in rows if states_NH is not None)

    def _windows(self, sequences: Iterable[TokenSequence]) -> Iterator[list[TokenSequence]]:
        window: list[TokenSequence] = []
        tokens = 0
        for sequence in sequences:
            window.append(sequence)
            tokens += len(sequence.ids_T)
            if tokens >= WINDOW_BATCHES * self._tokens_per_batch:
                yield window
                window, tokens = [], 0
        if window:
            yield window

    @torch.inference_mode()
    def _run(self, sequences: list[TokenSequence]) -> list[torch.Tensor]:
        if self._model is None:
            raise ModelError("the teacher engine is closed")
        ids_BT = pad_right([s.ids_T for s in sequences]).to(self._device)
        hidden_BTH = self._model(input_ids=ids_BT, use_cache=False).last_hidden_state
        # The state before a supervised token predicts it.
        return [
            hidden_BTH[row, torch.from_numpy(s.target_positions_N - 1)].to(torch.bfloat16).cpu()
            for row, s in enumerate(sequences)
        ]

    def close(self) -> None:
        """Drop the model. May be called twice."""
        self._model = None
