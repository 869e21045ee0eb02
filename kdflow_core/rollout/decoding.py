"""Answers of a transformers model to token prompts, and their log-probabilities.

Dimensions: B prompts of a batch, T tokens, N tokens of an answer, C some of them, H hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from kdflow_core.losses.logits import LogitProducer
from kdflow_core.models.heads import live_head
from kdflow_core.rollout.base import Prompt, Sampling

CHUNK_TOKENS = 256


@torch.inference_mode()
def generate_ids(
    *,
    model: PreTrainedModel,
    vocabulary_size: int,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> list[np.ndarray]:
    """The ids that follow each prompt, int32, as `Sampling` says.

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
    try:
        output_BT = generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=_generation_config(model, vocabulary_size, most, sampling),
        )
    finally:
        model.generation_config = brought
    answers = output_BT[:, width:].cpu().numpy().astype(np.int32)
    return [
        _through_end(ids_T[: prompt.max_new_tokens], sampling.stop_ids)
        for ids_T, prompt in zip(answers, prompts, strict=True)
    ]


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


@torch.inference_mode()
def log_probabilities(
    *,
    model: PreTrainedModel,
    prompt: np.ndarray,
    answer: np.ndarray,
    vocabulary_size: int,
    temperature: float,
) -> np.ndarray:
    """The log-probability of each token of an answer, in nats, float32 [N], as training computes
    it: from the last hidden states, over the true vocabulary.
    """
    ids_BT = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
    hidden_BTH = model.base_model(
        input_ids=ids_BT.to(model.device), use_cache=False
    ).last_hidden_state
    producer = LogitProducer(live_head(model, vocabulary_size), torch.float32)
    targets_N1 = torch.from_numpy(answer.astype(np.int64)).to(model.device).unsqueeze(-1)
    hidden_NH = hidden_BTH[0, len(prompt) - 1 : -1]
    parts = []
    for hidden_CH, targets_C1 in zip(
        torch.split(hidden_NH, CHUNK_TOKENS), torch.split(targets_N1, CHUNK_TOKENS), strict=True
    ):
        log_q_CV = torch.log_softmax(producer.logits(hidden_CH) / temperature, -1)
        parts.append(log_q_CV.gather(-1, targets_C1).squeeze(-1))
    return torch.cat(parts).cpu().numpy()
