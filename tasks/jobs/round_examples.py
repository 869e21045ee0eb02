"""The examples of a round: what the student has sampled, the data's own, and what is replayed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.schema.on_policy import OnPolicyConfig
from kdflow_core.alignment.translation import Translator
from kdflow_core.contracts import Example
from kdflow_core.errors import AlignmentError
from kdflow_core.rollout.prompts import round_prompts
from kdflow_core.rollout.rewards import advantages
from storage.artifact import ArtifactRef
from storage.rollouts import read_rollouts
from storage.tokens import TokenTable
from tasks.jobs.answering import answered
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TokenExamples
from tasks.rounds.round_record import RoundRequest, on_policy_count


@dataclass(frozen=True, kw_only=True)
class RoundExamples:
    """The round's own samples, and all that it trains on (those first)."""

    sampled: list[Example]
    all: list[Example]

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> Example:
        return self.all[index]

    def lengths(self, view: str) -> np.ndarray:
        """See `Examples`."""
        return np.array([len(e.views[view].ids_T) for e in self.all], np.int64)

    def supervised_counts(self, view: str) -> np.ndarray:
        """See `Examples`."""
        return np.array([int(e.views[view].supervised_T.sum()) for e in self.all], np.int64)


def prompts_of_round(
    config: OnPolicyConfig, table: TokenTable, seed: int, number: int, fraction: float
) -> tuple[list[int], list[int]]:
    """The training examples that the student answers in a round, and those that keep theirs."""
    source, names = table.sources()
    chosen = round_prompts(
        source=source,
        names=names,
        weights=config.prompt_weights,
        count=config.prompts_per_round,
        number=number,
        seed=seed,
    )
    count = on_policy_count(fraction, len(chosen))
    return chosen[:count], chosen[count:]


def round_examples(
    stage: StageRun, table: TokenTable, request: RoundRequest, translator: Translator | None = None
) -> RoundExamples:
    """What a round trains on, with a `translator` between two tokenizers. Raises AlignmentError for
    answers to other prompts.
    """
    config, seed = stage.run.on_policy, stage.run.seed
    assert config is not None
    data = TokenExamples(table)
    sampled = _answered(stage, config, data, request.rollouts, translator)
    _, kept = prompts_of_round(config, table, seed, request.number, request.fraction)
    replayed: list[Example] = []
    if config.replay is not None and request.replayed:
        earlier = [
            e for ref in request.replayed for e in _answered(stage, config, data, ref, translator)
        ]
        count = min(len(earlier), round(config.replay.ratio * len(sampled)))
        rng = np.random.default_rng([seed, request.number, 1])
        replayed = [earlier[i] for i in rng.permutation(len(earlier))[:count]]
    return RoundExamples(sampled=sampled, all=[*sampled, *(data[i] for i in kept), *replayed])


def _answered(
    stage: StageRun,
    config: OnPolicyConfig,
    data: TokenExamples,
    ref: ArtifactRef,
    translator: Translator | None,
) -> list[Example]:
    """The examples of a round's answers, with their advantages."""
    rows = read_rollouts(stage.store.local_copy(ref))
    worth: Sequence[float] = [0.0] * len(rows)
    if config.reward is not None and rows:
        worth = advantages(
            [row["reward"] for row in rows],
            [row["prompt"] for row in rows],
            normalize=config.reward.normalize,
        )
    examples = []
    for row, advantage in zip(rows, worth, strict=True):
        example = data[row["prompt"]]
        if not np.array_equal(example.student.context_ids_T, row["prompt_ids"]):
            raise AlignmentError(
                f"{ref.uri} answers another prompt than the data has at {row['prompt']}; delete it "
                "and run again"
            )
        examples.append(
            replace(
                answered(example, row["answer_ids"], "student", translator),
                sampled_log_prob_N=row["log_probs"],
                advantage=advantage,
            )
        )
    return examples
