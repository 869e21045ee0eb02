"""States of many sequences, in order, from an engine that takes them in batches.

Dimensions: N supervised tokens, H hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from kdflow_core.batching import select_rows
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import ModelError

CPU = torch.device("cpu")


def check_lengths(longest: int, max_length: int) -> None:
    """Refuse sequences beyond the teacher's context. Raises ModelError."""
    if longest > max_length:
        raise ModelError(
            f"a sequence has {longest} tokens, the teacher's context is {max_length}; lower "
            "data.max_length, or raise teacher.context_length where it is set"
        )


def stream_states(
    engine: TeacherEngine, sequences: Iterable[TokenSequence], *, window_tokens: int
) -> Iterator[torch.Tensor]:
    """One bfloat16 tensor [N, H] per sequence, on the CPU, in order.

    Batches are formed within windows of about `window_tokens` tokens, which bounds what is held.

    Raises ModelError for a sequence beyond the context length.
    """
    for window in _windows(sequences, window_tokens):
        lengths = [len(s.ids_T) for s in window]
        check_lengths(max(lengths), engine.max_length)
        states: list[torch.Tensor | None] = [None] * len(window)
        for batch in engine.pack(lengths):
            for i, states_NH in zip(batch, _run(engine, [window[i] for i in batch]), strict=True):
                states[i] = states_NH
        yield from (states_NH for states_NH in states if states_NH is not None)


def _run(engine: TeacherEngine, batch: Sequence[TokenSequence]) -> Sequence[torch.Tensor]:
    rows = engine.forward(batch)
    hidden_size = rows[0].buffer_RH.shape[1]
    states_NH = select_rows(rows, hidden_size=hidden_size, device=rows[0].buffer_RH.device).to(CPU)
    return torch.split(states_NH, [len(r.index_N) for r in rows])


def _windows(
    sequences: Iterable[TokenSequence], window_tokens: int
) -> Iterator[list[TokenSequence]]:
    window: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        window.append(sequence)
        tokens += len(sequence.ids_T)
        if tokens >= window_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window
