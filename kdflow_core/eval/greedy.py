"""Greedy answers to held-out prompts, and how many end with the gold answer."""

from collections import defaultdict
from collections.abc import Sequence

from transformers import PreTrainedModel

from kdflow_core.contracts import TokenSequence
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import DataError
from kdflow_core.eval.answers import answer_matches
from kdflow_core.functions import Judge, judged
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.rollout.decoding import generate_ids
from kdflow_core.sinks import Reporter

PROMPTS_PER_BATCH = 16


def generate_greedily(
    *,
    model: PreTrainedModel,
    chat: ChatFormat,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    reporter: Reporter,
    title: str,
) -> list[str]:
    """The model's answers, as text, to the prompts of the sequences (in order)."""
    texts: list[str] = []
    sampling = Sampling(temperature=0.0, stop_ids=chat.end_ids, log_probs=False)
    vocabulary_size = true_vocabulary_size(chat.tokenizer)
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
        texts += chat.tokenizer.batch_decode(
            [answer.ids_N.tolist() for answer in answers], skip_special_tokens=True
        )
        reporter.progress(done=len(texts), total=len(sequences), unit="answers", detail=title)
    return [text.strip() for text in texts]


def exact_match(
    texts: Sequence[str], answers: Sequence[str | None], sources: Sequence[str]
) -> dict[str, float]:
    """Share of matching answers by source, and under `all`; only where there is a gold answer."""
    worth = [
        None if answer is None else float(answer_matches(text, answer))
        for text, answer in zip(texts, answers, strict=True)
    ]
    return _means(worth, sources)


def accepted(
    verifier: Judge,
    texts: Sequence[str],
    prompts: Sequence[str],
    answers: Sequence[str | None],
    sources: Sequence[str],
    *,
    field: str,
) -> dict[str, float]:
    """What a user's function makes of the answers, on average by source, and under `all`. Raises
    DataError, which names the config's `field`, when that is not from 0 to 1.
    """
    worth = []
    for prompt, text, answer in zip(prompts, texts, answers, strict=True):
        value = judged(verifier, prompt, text, answer, field=field)
        if not 0 <= value <= 1:
            raise DataError(
                f"{field} gave {value} for the answer {text[:80]!r}; it must give true, false or a "
                "number from 0 to 1"
            )
        worth.append(value)
    return _means(worth, sources)


def _means(worth: Sequence[float | None], sources: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for value, source in zip(worth, sources, strict=True):
        if value is not None:
            for name in ("all", source):
                found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
