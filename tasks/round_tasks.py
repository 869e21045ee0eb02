"""The Prefect tasks of an on-policy round: thin, like those of the stages."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.artifact import ArtifactRef
from tasks.caching import run_cached
from tasks.on_policy import OnPolicyRun
from tasks.stage_tasks import cached_task, died_unexpectedly
from tasks.stages import StageSpec

# A process of the run may die more than once in many rounds.
RETRIES = 2


@cached_task("rollout", "The student's answers to a round's prompts", retries=RETRIES)
def rollout(spec: StageSpec, run: OnPolicyRun, number: int) -> ArtifactRef:
    """Roll out, or find what has been."""
    del spec  # what the cache goes by
    return run.roll_out(number)


@task(
    name="score",
    description="The teacher's hidden states of a round, which stay in the ranks",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_condition_fn=died_unexpectedly,
    tags=["kdflow"],
)
def score(run: OnPolicyRun, number: int) -> dict[str, Any]:
    """Score; the number of examples and rows."""
    return run.score(number)


@cached_task("train", "A round's optimizer steps", retries=RETRIES)
def train(spec: StageSpec, run: OnPolicyRun, number: int) -> ArtifactRef:
    """Train; the reference of the round's record."""
    del spec
    return run.train(number)


def run_round(run: OnPolicyRun, number: int) -> tuple[ArtifactRef, ArtifactRef]:
    """The three tasks of a round; the references of its rollouts and its record."""
    rollouts = run_cached(rollout, run.spec_of("rollouts", number), run, number)
    trained = run.is_trained(number)
    if not trained:
        score(run, number)
    spec = run.spec_of("round", number)
    return rollouts, run_cached(train, spec, run, number, valid=trained)
