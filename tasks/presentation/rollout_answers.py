"""A round's answers for people."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from configs.schema.run import RunConfig
from kdflow_core.errors import DataError
from storage.rollouts import read_rollouts
from tasks.stages.catalogue import ROLLOUTS
from tasks.stages.earlier_rounds import EarlierRounds
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages, round_identity


class Answer(BaseModel):
    """One answer as text, with what is known of it. `log_prob` is the mean per token, in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    prompt: str
    answer: str
    label: str | None
    tokens: int
    finish_reason: str
    version: int
    log_prob: float
    reward: float | None


def read_answers(folder: Path) -> list[Answer]:
    """The answers in the folder of a round's rollouts."""
    return [
        Answer(
            source=row["source"],
            prompt=row["prompt_text"],
            answer=row["answer_text"],
            label=row["label"],
            tokens=len(row["answer_ids"]),
            finish_reason=row["finish_reason"],
            version=row["version"],
            log_prob=float(row["log_probs"].mean()),
            reward=row["reward"],
        )
        for row in read_rollouts(folder)
    ]


def answers_of(run: RunConfig, number: int) -> list[Answer]:
    """The answers of a round. Raises DataError when there are none."""
    if run.on_policy is None:
        raise DataError(f"{run.name} is not on-policy: it has no rollouts")
    store = open_store(run)
    identity = round_identity(plan_stages(run)["train"], ROLLOUTS, number)
    ref = store.find(identity.kind, identity.digest)
    ref = ref or EarlierRounds(run, store).find(ROLLOUTS, number)
    if ref is None:
        raise DataError(
            f"there are no rollouts of round {number} of {run.name} in {store.root}; it has "
            f"{run.on_policy.rounds} rounds: run it first, with the same overrides"
        )
    return read_answers(store.local_copy(ref))
