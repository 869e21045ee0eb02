"""Answers of a transformers model to token prompts, and their log-probabilities.

Dimensions: B prompts of a batch, T tokens, N tokens of an answer, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from kdflow_core.rollout.base import Prompt, Sampling


class Answer(NamedTuple):
    """Ids int32 [N] and, if asked for, their log-probabilities when chosen, float32 [N]."""

    ids_N: np.ndarray
    log_prob_N: np.ndarray | None


@torch.inference_mode()
def generate_ids(
    *,
    model: PreTrainedModel,
    vocabulary_size: int,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> list[Answer]:
    """What follows each prompt, as `Sampling` says.

    Only the settings given count, not those that the model brings along.
    """
    width = max(len(prompt.ids_T) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        begin = width - len(prompt.ids_T)
        ids_BT[row, begin:] = torch.from_numpy(prompt.ids_T.astype(np.int64))
        mask_BT[row, begin:] = 1
    most = max(prompt.max_new_tokens for prompt in prompts)
    brought, model.generation_config = model.generation_config, GenerationConfig()
    generate: Any = model.generate
    log_probs = _TokenLogProbs(sampling.temperature or 1.0) if sampling.log_probs else None
    try:
        output_BT = generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=_generation_config(model, vocabulary_size, most, sampling),
            logits_processor=None if log_probs is None else LogitsProcessorList([log_probs]),
        )
    finally:
        model.generation_config = brought
    answers_BN = output_BT[:, width:].cpu().numpy().astype(np.int32)
    log_prob_BN = None if log_probs is None else log_probs.of(output_BT)
    answers = []
    for row, prompt in enumerate(prompts):
        ids_N = _through_end(answers_BN[row, : prompt.max_new_tokens], sampling.stop_ids)
        log_prob_N = None if log_prob_BN is None else log_prob_BN[row, : len(ids_N)]
        answers.append(Answer(ids_N, log_prob_N))
    return answers


def _generation_config(
    model: PreTrainedModel, vocabulary_size: int, max_new_tokens: int, sampling: Sampling
) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    # Rows of the head beyond the vocabulary are no tokens.
    padding = range(vocabulary_size, len(model.get_output_embeddings().weight))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(sampling.stop_ids) or None,
        pad_token_id=0,
        suppress_tokens=list(padding) or None,
        **chosen,
    )


def _through_end(ids_T: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """The ids through the first that ends the turn."""
    found = np.flatnonzero(np.isin(ids_T, ends))
    return ids_T[: int(found[0]) + 1] if len(found) else ids_T


class _TokenLogProbs(LogitsProcessor):
    """Keeps the log-probability of each token that is chosen, in nats, at a temperature: over all
    tokens that are let through, before any are left out by rank or mass.

    It sees the scores of a step before the token is chosen, and the token in the step after that.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._log_prob_BV: torch.Tensor | None = None
        self._chosen_B: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See `LogitsProcessor`; scores stay as they are."""
        self._take(input_ids[:, -1])
        self._log_prob_BV = torch.log_softmax(scores.float() / self._temperature, -1)
        return scores

    def of(self, output_BT: torch.Tensor) -> np.ndarray:
        """Those of all tokens that were generated, float32 [B, N]; `output_BT` ends with them."""
        self._take(output_BT[:, -1])
        return torch.stack(self._chosen_B, 1).cpu().numpy()

    def _take(self, token_B: torch.Tensor) -> None:
        if self._log_prob_BV is not None:
            self._chosen_B.append(self._log_prob_BV.gather(-1, token_B[:, None]).squeeze(-1))
