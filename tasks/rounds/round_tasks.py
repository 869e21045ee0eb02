"""The Prefect tasks of an on-policy round: thin, like those of the stages.

They take references and numbers; the run's rounds are found by the digest of their student.
"""

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.artifact import ArtifactRef
from tasks.execution.caching import run_cached
from tasks.execution.stage_tasks import cached_task, died_unexpectedly
from tasks.rounds.rounds_at_work import rounds_at_work
from tasks.stages.catalogue import ROLLOUTS, ROUND
from tasks.stages.identity import StageSpec

# A process of the run may die more than once in many rounds.
RETRIES = 2


@cached_task(ROLLOUTS.task, "The student's answers to a round's prompts", retries=RETRIES)
def rollout(spec: StageSpec, student: str, number: int) -> ArtifactRef:
    """Roll out, or find what has been."""
    del spec  # what the cache goes by
    return rounds_at_work(student).roll_out(number)


@task(
    name="score",
    description="The teacher's signals for a round, which stay in the ranks",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_condition_fn=died_unexpectedly,
)
def score(student: str, number: int) -> dict[str, int]:
    """Score; the number of examples and rows."""
    return rounds_at_work(student).score(number)


@cached_task(ROUND.task, "A round's optimizer steps", retries=RETRIES)
def train(spec: StageSpec, student: str, number: int) -> ArtifactRef:
    """Train; the reference of the round's record."""
    del spec
    return rounds_at_work(student).train(number)


def run_round(student: str, number: int) -> tuple[ArtifactRef, ArtifactRef]:
    """The three tasks of a round; the references of its rollouts and its record."""
    rounds = rounds_at_work(student)
    rollouts = run_cached(rollout, rounds.spec_of(ROLLOUTS, number), student, number)
    trained = rounds.is_trained(number)
    if not trained:
        score(student, number)
    spec = rounds.spec_of(ROUND, number)
    return rollouts, run_cached(train, spec, student, number, valid=trained)
