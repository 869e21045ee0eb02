"""The stages of a run, in order, each with what identifies its artifact.

Computed from the config, headers and file fingerprints: no server, no model library.
"""

from collections.abc import Mapping

from configs.schema.run import RunConfig
from configs.secrets import public
from storage.runs import record_run
from tasks.stages.catalogue import CATALOGUE, ROUND_ARTIFACTS, RoundArtifact, Stage
from tasks.stages.identity import StageIdentity, of_teacher, open_store
from tasks.stages.slices import Known, Slice


def plan_stages(run: RunConfig) -> dict[str, StageIdentity]:
    """The stages of a run by name, in the order in which they run.

    With `delivery: auto` they end with the estimate, which decides what follows.

    Raises DataError, ModelError or StoreError for data or models that are not there.
    """
    known, plan = Known(run), {}
    for stage in CATALOGUE.values():
        if run.delivery == "auto" and stage.behind_delivery:
            continue
        for own in stage.slice(known):
            identity = _identity(stage, own)
            known.add(identity)
            plan[identity.name] = identity
    return plan


def record_stages(run: RunConfig, stages: Mapping[str, StageIdentity]) -> None:
    """Note in the store that a run uses the artifacts of its stages, and of its rounds."""
    record_run(open_store(run), run.name, used_by(run, stages))


def used_by(run: RunConfig, stages: Mapping[str, StageIdentity]) -> dict[str, str]:
    """The artifacts of a run's stages, and of its rounds, as `kind/digest` by name."""
    made = {**stages, **round_identities(stages["train"], run)}
    return {name: f"{identity.kind}/{identity.digest}" for name, identity in made.items()}


def _identity(stage: Stage, own: Slice) -> StageIdentity:
    return StageIdentity(
        stage=stage.name,
        output=of_teacher(stage.output, own.teacher),
        teacher=own.teacher,
        kind=stage.kind,
        code_version=stage.code_version,
        config=public(dict(own.config)),
        inputs=dict(own.inputs),
    )


def round_identity(train: StageIdentity, made: RoundArtifact, number: int) -> StageIdentity:
    """What identifies an artifact of one round of on-policy training."""
    return StageIdentity(
        stage=train.stage,
        output=f"{made.kind}-{number}",
        kind=made.kind,
        code_version=made.code_version,
        config=train.config | {"round": number},
        inputs=train.inputs,
    )


def round_identities(train: StageIdentity, run: RunConfig) -> dict[str, StageIdentity]:
    """The identities of all rounds' artifacts, by task and round."""
    rounds = 0 if run.on_policy is None else run.on_policy.rounds
    return {
        f"{made.task}-{number}": round_identity(train, made, number)
        for number in range(1, rounds + 1)
        for made in ROUND_ARTIFACTS.values()
    }
