"""The stage in which a model answers the training prompts anew.

Ranks share the prompts by parts; a part is written once, whole, so that a stage that is run again
goes on with the missing ones.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema.data import AnswersConfig
from configs.schema.generation import Engine, SglangEngine
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.data.rendering import end_of_turn_ids
from kdflow_core.models.loading import load_tokenizer, true_vocabulary_size
from kdflow_core.rollout import build_rollout_engine
from kdflow_core.rollout.base import Sampling
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable, TokenWriter
from tasks.adapters import TokenExamples, token_row
from tasks.wiring.stage_run import StageRun, barrier, default_device, rank_and_size


def generate_answers(stage: StageRun) -> ArtifactRef | None:
    """The training examples with answers of the teacher or the student; every rank runs this, rank
    0 returns the artifact's reference.
    """
    config = stage.run.data.answers
    assert config is not None
    rank, size = rank_and_size()
    table = stage.tables()["train"]
    examples, answered = TokenExamples(table), _chosen(table, config.fraction)
    length = config.prompts_per_part
    parts = [answered[k : k + length] for k in range(0, len(answered), length)]
    folder = stage.workdir / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.arrow" for number in range(len(parts))]
    missing = [k for k in range(rank, len(parts), size) if not paths[k].is_file()]
    if missing:
        wanted = sum(len(parts[k]) for k in missing)
        with closing(_Answerer(stage, config, rank=rank, wanted=wanted)) as writer:
            for k in missing:
                seed = (stage.run.seed << 32) + k  # a part is the same whoever writes it
                _write(paths[k], writer.answers([examples[i] for i in parts[k]], seed))
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

    def __init__(self, stage: StageRun, config: AnswersConfig, *, rank: int, wanted: int) -> None:
        self._config = config
        self._written, self._wanted = 0, wanted
        self._stage = stage
        folder = stage.model_folder(config.by)
        tokenizer = load_tokenizer(folder)
        self._sampling = Sampling(
            stop_ids=tuple(sorted(end_of_turn_ids(tokenizer))),
            temperature=config.temperature,
            top_p=config.top_p,
            log_probs=config.by == "student" and config.temperature > 0,
        )
        self._engine = build_rollout_engine(
            _placed(config.engine, rank),
            folder=folder,
            vocabulary_size=true_vocabulary_size(tokenizer),
            max_length=stage.length_limit,
            device=default_device(),
        )

    def answers(self, examples: Sequence[Example], seed: int) -> Iterator[Example]:
        """The examples with new answers."""
        by, most = self._config.by, self._config.max_new_tokens
        prompts = [self._stage.prompt(example, by, most) for example in examples]
        found = {}
        for number, completion in self._engine.generate(prompts, self._sampling, seed=seed):
            found[number] = completion
            self._written += 1
            self._stage.reporter.progress(done=self._written, total=self._wanted, unit="answers")
        for number, example in enumerate(examples):
            answer = found[number]
            yield replace(
                example,
                student=with_answer(example.student, answer.ids_N),
                teacher=with_answer(example.teacher, answer.ids_N),
                sampled_log_prob_N=answer.log_prob_N,
            )

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def _placed(engine: Engine, rank: int) -> Engine:
    """The engine of a rank: its copy of the model has GPUs of its own."""
    if not isinstance(engine, SglangEngine):
        return engine
    first = engine.first_gpu + rank * engine.tensor_parallel
    return engine.model_copy(update={"first_gpu": first})


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
