"""The flow `kd`: tokenize -> extract -> train -> evaluate -> report."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from configs.schema.run import RunConfig
from configs.secrets import public
from flows.crashed_runs import marked, set_crashed
from flows.on_policy_round import train_on_policy
from storage.artifact import ArtifactRef
from storage.runs import record_run
from tasks.caching import run_cached
from tasks.checks import checked_plan
from tasks.results import artifact_key, check_run, evaluation_rows, report_path, student_path
from tasks.stage_tasks import STAGE_TASKS, share_out
from tasks.stages import (
    StageIdentity,
    decided,
    open_store,
    round_identities,
    stage_spec,
)

_GIVEN: ContextVar[dict[str, Any] | None] = ContextVar("overrides with their secrets", default=None)


@contextmanager
def given_overrides(overrides: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Overrides for a run of this process: without the secrets in their URLs, as Prefect keeps the
    parameters of its runs; `kd` finds the whole ones.
    """
    token = _GIVEN.set(overrides)
    try:
        yield public(overrides)
    finally:
        _GIVEN.reset(token)


@flow(name="kd", description="Distill a teacher into a student.", validate_parameters=True)
def kd(
    recipe: str = "quickstart", overrides: dict[str, Any] | None = None
) -> dict[str, ArtifactRef]:
    """Run a recipe with dotted overrides; finished stages come from cache.

    Returns the artifact references by name (teacher_model, tokens, states, student ...).
    """
    given = _GIVEN.get()
    run = check_run(recipe, (overrides or {}) if given is None else given)
    if crashed := set_crashed(run.storage.scratch):
        get_run_logger().info("%d runs whose process is gone are now shown as crashed", crashed)
    with marked(run.storage.scratch, flow_run.id):
        return _run(run)


def _run(run: RunConfig) -> dict[str, ArtifactRef]:
    """All stages, those of a run whose source an estimate chooses in two parts."""
    done: dict[str, ArtifactRef] = {}
    if run.source == "auto":
        plan = checked_plan(run, download=True)
        done = _run_stages(run, plan, done)
        run = decided(run, done["estimate"])
        get_run_logger().info("source: auto is %s here", run.source)
    plan = checked_plan(run, download=True)
    made = plan | round_identities(plan["train"], run)
    used = {stage: f"{identity.kind}/{identity.digest}" for stage, identity in made.items()}
    record_run(open_store(run), run.name, used)
    done = _run_stages(run, plan, done)
    _publish_to_ui(run, done)
    return done


def _run_stages(
    run: RunConfig, plan: dict[str, StageIdentity], done: dict[str, ArtifactRef]
) -> dict[str, ArtifactRef]:
    """Run what is not done yet, in order."""
    for identity in plan.values():
        if identity.output in done:
            continue
        spec = stage_spec(identity, run, done)
        if identity.stage == "extract":
            share_out(spec)
        if identity.stage == "train" and run.mode == "onpolicy":
            train_on_policy(spec)
        done = done | {identity.output: run_cached(STAGE_TASKS[identity.stage], spec)}
    return done


def _publish_to_ui(run: RunConfig, done: dict[str, ArtifactRef]) -> None:
    rows = evaluation_rows(run, done["evaluation"])
    key = artifact_key(run.name)
    table = [{k: _shown(v) for k, v in row.items()} for row in rows]
    create_table_artifact(key=f"{key}-evaluation", table=table, description="Held-out evaluation")
    sizes = "\n".join(f"| {n} | `{r.digest}` | {r.num_bytes:,} |" for n, r in done.items())
    create_markdown_artifact(
        key=f"{key}-artifacts",
        markdown=f"| artifact | digest | bytes |\n|---|---|---|\n{sizes}\n",
        description="The run's artifacts",
    )
    path = report_path(run, done["report"])
    create_link_artifact(key=f"{key}-report", link=path.as_uri(), description="The HTML report")
    get_run_logger().info("student: %s", student_path(run, done["student"]))
    get_run_logger().info("report: %s", path)


def _shown(value: Any) -> Any:
    """A cell of a table: what JSON has no number for is text."""
    if value is None:
        return ""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
