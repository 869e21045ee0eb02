"""The stage in which a model answers the training prompts anew.

Ranks share the prompts by parts; a part is written once, whole, so that a stage that is run again
goes on with the missing ones.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema.data import AnswersConfig
from configs.schema.run import RunConfig
from kdflow_core.alignment.translation import Translator, with_answer
from kdflow_core.contracts import Example
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout import build_rollout_engine, placed
from kdflow_core.rollout.base import Sampling
from kdflow_core.workers.devices import barrier
from storage.artifact import ArtifactRef
from storage.digest import digest
from storage.sealed import is_whole, seal
from storage.tokens import TokenTable, TokenWriter
from tasks.jobs import aligning, chats, parts
from tasks.jobs.earlier_answers import Held, earlier_answers
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.stored import TokenExamples, token_row
from tasks.stages.slices import SPLITS, Side, Split

HELDOUT_SEEDS = 1 << 24  # behind those of the training data's parts


@job("generate")
def generate_answers(stage: StageRun) -> ArtifactRef | None:
    """The examples with answers of the teacher or the student; every rank runs this, rank 0 returns
    the artifact's reference.
    """
    config = stage.run.data.answers
    assert config is not None
    parts.join(stage)
    rank, size = parts.rank_and_size()
    tokens = stage.store.local_copy(stage.spec.inputs["tokens"])
    tables = {split: TokenTable(tokens / f"{split}.arrow") for split in SPLITS}
    wanted = {split: _wanted(stage.run, split, table) for split, table in tables.items()}
    earlier = earlier_answers(stage, partial(_wanted, stage.run))
    held = {split: earlier.of(tables[split], rows) for split, rows in wanted.items()}
    anew = {split: [k for k in rows if k not in held[split]] for split, rows in wanted.items()}
    copied = sum(map(len, held.values()))
    if copied and rank == 0:
        stage.reporter.message(
            f"{copied} of {sum(map(len, wanted.values()))} answers are copied: this model has "
            "written them for other runs"
        )
    portions = [
        _Part(split=split, number=k, rows=rows[begin : begin + config.prompts_per_part])
        for split, rows in anew.items()
        for k, begin in enumerate(range(0, len(rows), config.prompts_per_part))
    ]
    folder = stage.workdir / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in portions[rank::size] if not is_whole(part.path(folder))]
    if missing:
        count = sum(len(part.rows) for part in missing)
        with closing(_Answerer(stage, config, wanted=count)) as writer:
            for part in missing:
                examples = TokenExamples(tables[part.split])
                seed = (stage.run.seed << 32) + part.seed  # a part is the same whoever writes it
                chosen = [examples[i] for i in part.rows]
                _write(part.path(folder), writer.answers(chosen, seed))
    barrier()
    if rank != 0:
        return None
    target = stage.workdir / "artifact"
    target.mkdir(exist_ok=True)
    supervised = 0
    for split, table in tables.items():
        paths = [part.path(folder) for part in portions if part.split == split]
        supervised += _merge(
            TokenExamples(table), set(anew[split]), held[split], paths, target / f"{split}.arrow"
        )
    translated = _translated(stage, config, target, wanted)
    files = stage.store.publish(stage.kind, stage.digest, target)
    counts = {
        "sequences": len(tables["train"]),
        "answered": len(wanted["train"]),
        "heldout_answered": len(wanted["heldout"]),
        "supervised_tokens": supervised,
    }
    info = {"by": config.by, "translated": translated, "copied": copied}
    ref = stage.commit(files=files, counts=counts, info=info)
    shutil.rmtree(stage.workdir)  # the parts have served
    return ref


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some of the rows of a split that are answered anew."""

    split: Split
    number: int
    rows: list[int]

    @property
    def seed(self) -> int:
        """Another one for each part."""
        return self.number if self.split == "train" else HELDOUT_SEEDS + self.number

    def path(self, folder: Path) -> Path:
        """Where its answers lie."""
        # Which rows it has depends on what the store held when it was begun.
        return folder / f"{self.split}-{self.number:06d}-{digest(self.rows)[:8]}.arrow"


def _wanted(run: RunConfig, split: Split, table: TokenTable) -> list[int]:
    """Which examples are answered: prompts that lack an answer, unless the student will answer them
    in its rounds, and in training data the share that is to be answered anew.
    """
    config = run.data.answers
    assert config is not None
    lacking = table.supervised_counts("student") == 0
    if run.on_policy is not None:
        if split == "train" and run.on_policy.all_sampled:
            lacking[:] = False
        return [int(i) for i in np.flatnonzero(lacking)]
    if split == "heldout":
        return [int(i) for i in np.flatnonzero(lacking)]
    # By their digests, which are uniform: 53 bits of each, as many as a float compares exactly.
    uniform = table.digests().view(">u8")[:, 0] >> np.uint64(11)
    return [int(i) for i in np.flatnonzero(lacking | (uniform < config.fraction * 2**53))]


class _Answerer:
    """The model that writes, and how."""

    def __init__(self, stage: StageRun, config: AnswersConfig, *, wanted: int) -> None:
        self._config = config
        self._written, self._wanted = 0, wanted
        self._stage = stage
        folder, chat = stage.model_folder(config.by), chats.chat(stage, config.by)
        self._translator = aligning.translator(stage)
        self._sampling = Sampling(
            stop_ids=chat.end_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            log_probs=config.by == "student" and config.temperature > 0,
        )
        self._engine = build_rollout_engine(
            placed(config.engine, stage.context.rank_among_devices),
            folder=folder,
            vocabulary_size=true_vocabulary_size(chat.tokenizer),
            max_length=stage.length_limit,
            device=parts.device(stage),
            trust_remote_code=stage.trusts(config.by),
        )

    def answers(self, examples: Sequence[Example], seed: int) -> Iterator[Example]:
        """The examples with new answers."""
        by, most = self._config.by, self._config.max_new_tokens
        prompts = [parts.prompt(self._stage, example, by, most) for example in examples]
        found = {}
        for number, completion in self._engine.generate(prompts, self._sampling, seed=seed):
            found[number] = completion
            self._written += 1
            self._stage.reporter.progress(done=self._written, total=self._wanted, unit="answers")
        for number, example in enumerate(examples):
            answer = found[number]
            yield replace(
                answered(example, answer.ids_N, by, self._translator),
                sampled_log_prob_N=answer.log_prob_N,
            )

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def answered(
    example: Example, answer: np.ndarray, by: Side, translator: Translator | None
) -> Example:
    """An example with what the model of a side has written behind its context; with a `translator`,
    in the other side's own tokens there.
    """
    if translator is not None:
        return translator.answered(example, answer, by)
    views = {view: with_answer(sequence, answer) for view, sequence in example.views.items()}
    return replace(example, views=views)


def _write(path: Path, examples: Iterator[Example]) -> None:
    """One part; under another name until it is whole."""
    temporary = path.with_suffix(".tmp")
    with TokenWriter(temporary) as writer:
        for example in examples:
            writer.add(token_row(example))
    temporary.rename(path)
    seal(path)


def _merge(
    examples: TokenExamples,
    answered: set[int],
    held: Mapping[int, Held],
    parts: Sequence[Path],
    path: Path,
) -> int:
    """All examples in their order, the answered ones from the parts, or from where they are held;
    the supervised tokens.
    """
    anew = chain.from_iterable(_rows(part) for part in parts)
    tokens = 0
    with TokenWriter(path) as writer:
        for index in range(len(examples)):
            row = next(anew) if index in answered else token_row(examples[index])
            if index in held:
                row = held[index].as_answer_of(row)
            writer.add(row)
            tokens += int(row["student_supervised"].sum())
    return tokens


def _translated(
    stage: StageRun, config: AnswersConfig, folder: Path, answered: Mapping[Split, Sequence[int]]
) -> dict[str, int] | None:
    """What became of the answers on their way to the other side's tokens; None where both have the
    same.
    """
    translator = aligning.translator(stage)
    if translator is None:
        return None
    tables = {s: TokenExamples(TokenTable(folder / f"{s}.arrow")) for s in answered}
    examples = (tables[split][row] for split, rows in answered.items() for row in rows)
    translated = translator.count(examples, config.by)
    aligning.tell_shortened(stage, translated)
    return asdict(translated)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a token file."""
    table = TokenTable(path)
    return (table[index] for index in range(len(table)))
