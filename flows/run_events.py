"""What a run tells Prefect's automations: an event of each stage, each round, and of its student.

The names of resources and events are for automations to match; figures are in the payloads.
"""

from collections.abc import Mapping
from typing import Any

from prefect.events import emit_event

from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from tasks.execution.promotion import Promotion
from tasks.rounds.round_record import RoundRecord
from tasks.stages.identity import StageIdentity

STAGE, ROUND, STUDENT = "kdflow.stage", "kdflow.round", "kdflow.student"


def stage_finished(run: RunConfig, identity: StageIdentity, ref: ArtifactRef) -> None:
    """`kdflow.stage.finished`, of a stage that came from cache, too."""
    labels = {"kdflow.stage": identity.name, "kdflow.artifact": ref.name}
    _emit(run, f"{STAGE}.finished", f"{STAGE}.{identity.name}", labels, {"bytes": ref.num_bytes})


def round_finished(run: RunConfig, record: RoundRecord) -> None:
    """`kdflow.round.finished`, with the round's figures."""
    figures = record.model_dump(mode="json", include={"kd", "heldout", "reward_mean", "answers"})
    labels = {"kdflow.round": str(record.number)}
    _emit(run, f"{ROUND}.finished", f"{ROUND}.{record.number}", labels, figures)


def student_judged(
    run: RunConfig, student: ArtifactRef, scores: Mapping[str, Any], promotion: Promotion
) -> None:
    """`kdflow.student.promoted`, `.kept-back` or `.unchanged`, with its held-out scores."""
    payload = {"scores": dict(scores), "why": promotion.text}
    event, resource = f"{STUDENT}.{promotion.outcome}", f"{STUDENT}.{student.digest}"
    _emit(run, event, resource, {}, payload)


def _emit(
    run: RunConfig, event: str, resource: str, labels: dict[str, str], payload: dict[str, Any]
) -> None:
    named = {"prefect.resource.id": resource, "prefect.resource.name": run.name}
    emit_event(event, resource=named | {"kdflow.run": run.name} | labels, payload=payload)
