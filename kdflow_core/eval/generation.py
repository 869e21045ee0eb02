"""Greedy answers to held-out prompts, and how many end with the gold answer."""

import re
import string
from collections import defaultdict
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdflow_core.contracts import Reporter, TokenSequence
from kdflow_core.data.rendering import end_of_turn_ids
from kdflow_core.models.loading import true_vocabulary_size
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.rollout.generation import generate_ids

PROMPTS_PER_BATCH = 16


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
    texts: list[str] = []
    sampling = Sampling(temperature=0.0, stop_ids=tuple(sorted(end_of_turn_ids(tokenizer))))
    vocabulary_size = true_vocabulary_size(tokenizer)
    for begin in range(0, len(sequences), PROMPTS_PER_BATCH):
        answers = generate_ids(
            model=model,
            vocabulary_size=vocabulary_size,
            prompts=[
                Prompt(ids_T=s.prompt_ids_T, max_new_tokens=max_new_tokens)
                for s in sequences[begin : begin + PROMPTS_PER_BATCH]
            ],
            sampling=sampling,
        )
        texts += tokenizer.batch_decode([ids.tolist() for ids in answers], skip_special_tokens=True)
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
