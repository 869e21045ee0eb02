"""Greedy answers to held-out prompts, and how many end with the gold answer.

Dimensions: B prompts of a batch, T tokens.
"""

import re
import string
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdflow_core.contracts import Reporter, TokenSequence
from kdflow_core.data.rendering import end_of_turn_ids

PROMPTS_PER_BATCH = 16


@torch.inference_mode()
def generate_greedily(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    reporter: Reporter,
    label: str,
) -> list[str]:
    """The model's answers, as text, to the prompts of the sequences (in order)."""
    ends = sorted(end_of_turn_ids(tokenizer))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    texts: list[str] = []
    for begin in range(0, len(sequences), PROMPTS_PER_BATCH):
        prompts = [s.prompt_ids_T for s in sequences[begin : begin + PROMPTS_PER_BATCH]]
        width = max(len(p) for p in prompts)
        ids_BT = torch.full((len(prompts), width), pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BT[row, width - len(prompt) :] = 1
        generate: Any = model.generate
        output_BT = generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=pad_id,
        )
        texts += tokenizer.batch_decode(output_BT[:, width:], skip_special_tokens=True)
        reporter.progress(done=len(texts), total=len(sequences), unit="answers", detail=label)
    return [text.strip() for text in texts]


def answer_matches(generated: str, answer: str) -> bool:
    """Whether the generation, without case and punctuation, is the gold answer or ends with it."""
    words, gold = _words(generated), _words(answer)
    return bool(gold) and words[-len(gold) :] == gold


def _words(text: str) -> list[str]:
    kept = string.punctuation.replace("-", "")  # a minus sign is part of a number
    return re.sub(f"[{re.escape(kept)}]", " ", text.casefold()).split()


def exact_match(
    texts: Sequence[str], answers: Sequence[str | None], sources: Sequence[str]
) -> dict[str, float]:
    """Share of matching answers by source, and under `all`; only where there is a gold answer."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for text, answer, source in zip(texts, answers, sources, strict=True):
        if answer is not None:
            for name in ("all", source):
                hits[name].append(answer_matches(text, answer))
    return {name: sum(values) / len(values) for name, values in hits.items()}
