"""The flow `kd`: tokenize -> extract -> train -> evaluate -> report."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from configs.explain import explain
from configs.schema.run import RunConfig
from flows.crashed_runs import marked, set_crashed
from flows.on_policy_round import train_on_policy
from flows.run_events import stage_finished, student_judged
from flows.service_commands import limit_exists, limit_name
from storage.artifact import ArtifactRef
from tasks.checks.run_check import PlannedRun, checked_plan, planned_run
from tasks.execution.caching import run_cached
from tasks.execution.promotion import promote_student
from tasks.execution.stage_tasks import STAGE_TASKS, share_out
from tasks.forecast.estimate import decided
from tasks.presentation.history import STUDENT
from tasks.presentation.results import (
    SIDES,
    artifact_key,
    benchmark_rows,
    evaluation_rows,
    report_path,
    student_path,
    with_error,
)
from tasks.stages.catalogue import CATALOGUE
from tasks.stages.identity import open_store, stage_spec
from tasks.stages.planning import record_stages

_PLANNED: ContextVar[PlannedRun | None] = ContextVar("the run of this process", default=None)


@contextmanager
def given_run(planned: PlannedRun) -> Iterator[None]:
    """Within, `kd` runs what was checked and planned already. Prefect keeps the parameters of its
    runs, and gets them without the secrets in their URLs; here is the whole run.
    """
    token = _PLANNED.set(planned)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def _description() -> str:
    """What the UI shows of the flow: also what each field is for that can be overridden."""
    rows = [f"| `{f.name}` | {f.default or ''} | {f.text} |" for f in explain()]
    table = "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])
    return f"Distill a teacher into a student.\n\nWhat `overrides` can set:\n\n{table}\n"


@flow(name="kd", description=_description(), validate_parameters=True)
def kd(
    recipe: str = "quickstart", overrides: dict[str, Any] | None = None
) -> dict[str, ArtifactRef]:
    """Run a recipe with dotted overrides; finished stages come from cache.

    Args:
        recipe: A shipped recipe's name, or the path of a YAML file.
        overrides: Values by dotted field names, for instance {"student.lr": 1e-4}; the flow's
            description lists the fields.

    Returns the artifact references by name (teacher_model, tokens, states, student ...).
    """
    planned = _PLANNED.get() or planned_run(recipe, overrides or {}, download=True)
    scratch = planned.run.storage.scratch
    if crashed := set_crashed(scratch):
        get_run_logger().info("%d runs whose process is gone are now shown as crashed", crashed)
    with marked(scratch, flow_run.id), _alone(planned.run.device_pool):
        return _run(planned)


@contextmanager
def _alone(pool: str) -> Iterator[None]:
    """Within, no other run of a pool of devices is at work, where the server has a limit for it."""
    with get_client(sync_client=True) as client:
        limited = limit_exists(client, pool)
    if not limited:
        yield
        return
    get_run_logger().info("waiting for the devices of the pool %s, if others use them", pool)
    with concurrency(limit_name(pool), occupy=1):
        yield


def _run(planned: PlannedRun) -> dict[str, ArtifactRef]:
    """All stages, those of a run whose delivery an estimate chooses in two parts."""
    done: dict[str, ArtifactRef] = {}
    if planned.run.delivery == "auto":
        done = _run_stages(planned, done)
        run = decided(planned.run, done["estimate"])
        get_run_logger().info("delivery: auto is %s here", run.delivery)
        planned = PlannedRun(run=run, stages=checked_plan(run, download=True))
    run, stages = planned.run, planned.stages
    record_stages(run, stages)
    done = _run_stages(planned, done)
    rows = evaluation_rows(open_store(run), done["evaluation"])
    scores = [{name: _shown(value) for name, value in row.items()} for row in rows]
    _publish_to_ui(run, done, scores)
    promotion = promote_student(run, stages, done)
    get_run_logger().info("%s", promotion.text)
    (own,) = (row for row in scores if (row["model"], row["source"]) == (STUDENT, "all"))
    student_judged(run, done["student"], own, promotion)
    return done


def _run_stages(planned: PlannedRun, done: dict[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """Run what is not done yet, in order."""
    for identity in planned.stages.values():
        if identity.output in done:
            continue
        spec = stage_spec(identity, planned.run, done)
        share_out(spec)
        if CATALOGUE[identity.stage].in_rounds(spec.run):
            train_on_policy(spec)
        ref = run_cached(STAGE_TASKS[identity.stage], spec)
        stage_finished(planned.run, identity, ref)
        done = done | {identity.output: ref}
    return done


def _publish_to_ui(
    run: RunConfig, done: dict[str, ArtifactRef], scores: list[dict[str, Any]]
) -> None:
    store = open_store(run)
    key = artifact_key(run.name)
    create_table_artifact(key=f"{key}-evaluation", table=scores, description="Held-out evaluation")
    if benchmarks := benchmark_rows(store, done):
        create_table_artifact(
            key=f"{key}-benchmarks",
            table=[row | {side: with_error(row[side]) for side in SIDES} for row in benchmarks],
            description="Benchmarks",
        )
    sizes = "\n".join(f"| {n} | `{r.digest}` | {r.num_bytes:,} |" for n, r in done.items())
    create_markdown_artifact(
        key=f"{key}-artifacts",
        markdown=f"| artifact | digest | bytes |\n|---|---|---|\n{sizes}\n",
        description="The run's artifacts",
    )
    path = report_path(store, done["report"])
    create_link_artifact(key=f"{key}-report", link=path.as_uri(), description="The HTML report")
    get_run_logger().info("student: %s", student_path(store, done["student"]))
    get_run_logger().info("report: %s", path)


def _shown(value: Any) -> Any:
    """A cell of a table: what JSON has no number for is text."""
    if value is None:
        return ""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
