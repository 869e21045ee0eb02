"""The stage in which a model answers the training prompts anew.

Ranks share the prompts by parts; a part is written once, whole, so that a stage that is run again
goes on with the missing ones.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from configs.schema.data import AnswersConfig
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.data.rendering import end_of_turn_ids
from kdflow_core.models.folders import context_length
from kdflow_core.models.loading import (
    DTYPES,
    load_causal_lm,
    load_tokenizer,
    true_vocabulary_size,
)
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.rollout.generation import generate_ids, log_probabilities
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable, TokenWriter
from tasks.adapters import TokenExamples, token_row
from tasks.wiring.stage_run import StageRun, barrier, default_device, rank_and_size

BATCHES_PER_PART = 8


def generate_answers(stage: StageRun) -> ArtifactRef | None:
    """The training examples with answers of the teacher or the student; every rank runs this, rank
    0 returns the artifact's reference.
    """
    config = stage.run.data.answers
    assert config is not None
    rank, size = rank_and_size()
    table = stage.tables()["train"]
    examples, answered = TokenExamples(table), _chosen(table, config.fraction)
    length = config.prompts_per_batch * BATCHES_PER_PART
    parts = [answered[k : k + length] for k in range(0, len(answered), length)]
    folder = stage.workdir / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.arrow" for number in range(len(parts))]
    missing = [k for k in range(rank, len(parts), size) if not paths[k].is_file()]
    if missing:
        writer = _Answerer(stage, config)
        for done, k in enumerate(missing):
            torch.manual_seed((stage.run.seed << 32) + k)  # a part is the same whoever writes it
            _write(paths[k], writer.answers([examples[i] for i in parts[k]]))
            stage.reporter.progress(done=done + 1, total=len(missing), unit="parts of the prompts")
    barrier()
    if rank != 0:
        return None
    target = stage.workdir / "artifact"
    target.mkdir(exist_ok=True)
    tokens = _merge(examples, set(answered), paths, target / "train.arrow")
    files = stage.store.publish(stage.kind, stage.digest, target)
    counts = {"sequences": len(examples), "answered": len(answered), "supervised_tokens": tokens}
    ref = stage.commit(files=files, counts=counts, info={"by": config.by})
    shutil.rmtree(stage.workdir)  # the parts have served
    return ref


def _chosen(table: TokenTable, fraction: float) -> list[int]:
    """Which examples' prompts are answered anew, by their digests, which are uniform."""
    # 53 bits of each: as many as a float compares exactly.
    uniform = table.digests().view(">u8")[:, 0] >> np.uint64(11)
    return [int(i) for i in np.flatnonzero(uniform < fraction * 2**53)]


class _Answerer:
    """The model that writes, and how."""

    def __init__(self, stage: StageRun, config: AnswersConfig) -> None:
        run = stage.run
        folder = stage.model_folder(config.by)
        teacher = config.by == "teacher"
        self._config = config
        self._limit = min(
            run.data.max_length,
            context_length(stage.model_folder("teacher")),
            context_length(stage.model_folder("student")),
        )
        tokenizer = load_tokenizer(folder)
        self._stop_ids = tuple(sorted(end_of_turn_ids(tokenizer)))
        self._vocabulary_size = true_vocabulary_size(tokenizer)
        self._model: PreTrainedModel = load_causal_lm(
            folder,
            dtype=DTYPES[run.teacher.dtype if teacher else run.student.compute_dtype],
            attention=run.student.attention,
            device=default_device(),
        )

    def answers(self, examples: Sequence[Example]) -> Iterator[Example]:
        """The examples with new answers."""
        size = self._config.prompts_per_batch
        for begin in range(0, len(examples), size):
            yield from self._batch(examples[begin : begin + size])

    def _batch(self, examples: Sequence[Example]) -> Iterator[Example]:
        config = self._config
        longest = max(len(side.context_ids_T) for e in examples for side in (e.teacher, e.student))
        room = min(config.max_new_tokens, self._limit - longest)
        prompts = [
            Prompt(ids_T=getattr(example, config.by).context_ids_T, max_new_tokens=room)
            for example in examples
        ]
        answers = generate_ids(
            model=self._model,
            vocabulary_size=self._vocabulary_size,
            prompts=prompts,
            sampling=Sampling(
                temperature=config.temperature, top_p=config.top_p, stop_ids=self._stop_ids
            ),
        )
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            yield self._answered(example, prompt.ids_T, answer)

    def _answered(self, example: Example, prompt: np.ndarray, answer: np.ndarray) -> Example:
        log_prob_N = None
        if self._config.by == "student" and self._config.temperature > 0:
            log_prob_N = log_probabilities(
                model=self._model,
                prompt=prompt,
                answer=answer,
                vocabulary_size=self._vocabulary_size,
                temperature=self._config.temperature,
            )
        return replace(
            example,
            student=with_answer(example.student, answer),
            teacher=with_answer(example.teacher, answer),
            sampled_log_prob_N=log_prob_N,
        )


def with_answer(sequence: TokenSequence, answer: np.ndarray) -> TokenSequence:
    """The sequence's context with another answer behind it, which alone is supervised."""
    context = sequence.context_ids_T
    supervised_T = np.zeros(len(context) + len(answer), bool)
    supervised_T[len(context) :] = True
    return TokenSequence(ids_T=np.concatenate([context, answer]), supervised_T=supervised_T)


def _write(path: Path, examples: Iterator[Example]) -> None:
    """One part; under another name until it is whole."""
    temporary = path.with_suffix(".tmp")
    with TokenWriter(temporary) as writer:
        for example in examples:
            writer.add(token_row(example))
    temporary.rename(path)


def _merge(examples: TokenExamples, answered: set[int], parts: Sequence[Path], path: Path) -> int:
    """All examples in their order, the answered ones from the parts; the supervised tokens."""
    anew = chain.from_iterable(_rows(part) for part in parts)
    tokens = 0
    with TokenWriter(path) as writer:
        for index in range(len(examples)):
            row = next(anew) if index in answered else token_row(examples[index])
            writer.add(row)
            tokens += int(row["student_supervised"].sum())
    return tokens


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a token file."""
    table = TokenTable(path)
    return (table[index] for index in range(len(table)))
