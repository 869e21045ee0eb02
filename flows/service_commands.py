"""The commands `kdflow service ...`: what a Prefect server needs beside our deployments.

A limit for each pool of devices, of which one run at a time is at work, and an automation that sets
runs to crashed whose process was killed: Prefect would show them as running for ever.
"""

from datetime import timedelta
from typing import Annotated, Any

import typer

from configs.errors import ConfigError
from configs.schema.run import DEFAULT_POOL
from flows.prefect_api import configured_api, require_answer

AUTOMATION = "kdflow: runs without a heartbeat have crashed"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
SILENT_S = 600  # a few heartbeats, which by default are 180 s apart
app = typer.Typer(help="Set up a Prefect server for kdflow's runs.", no_args_is_help=True)
Pool = Annotated[str, typer.Option(help="The pool of devices, as `device_pool` of the recipes.")]


@app.callback()
def service_options() -> None:
    """Set up a Prefect server for kdflow's runs."""


@app.command()
def init(pool: Pool = DEFAULT_POOL) -> None:
    """Create the limit of a pool of devices, and the automation for runs that were killed."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415 - takes seconds
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate  # noqa: PLC0415

    _require_server()
    with get_client(sync_client=True) as client:
        if limit_exists(client, pool):
            typer.echo(f"the limit {limit_name(pool)} is there")
        else:
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=limit_name(pool), limit=1)
            )
            typer.echo(f"created the limit {limit_name(pool)}: one run of this pool at a time")
        if _automations(client):
            typer.echo(f"the automation '{AUTOMATION}' is there")
        else:
            client.create_automation(_automation())
            typer.echo(f"created the automation '{AUTOMATION}'")


@app.command()
def remove(pool: Pool = DEFAULT_POOL) -> None:
    """Remove what `init` has created."""
    from prefect.client.orchestration import get_client  # noqa: PLC0415 - takes seconds

    _require_server()
    with get_client(sync_client=True) as client:
        if limit_exists(client, pool):
            client.delete_global_concurrency_limit_by_name(limit_name(pool))
            typer.echo(f"removed the limit {limit_name(pool)}")
        for automation in _automations(client):
            client.delete_automation(automation.id)
            typer.echo(f"removed the automation '{AUTOMATION}'")


def _require_server() -> None:
    """Raises ConfigError where no server is set up that lasts, or it does not answer."""
    url = configured_api()
    if url is None:
        raise ConfigError(
            "PREFECT_API_URL is not set: this is for a server that goes on running; start one "
            "(prefect server start), and set PREFECT_API_URL to its address"
        )
    require_answer(url)


def limit_name(pool: str) -> str:
    """What Prefect calls the limit of a pool of devices."""
    return f"kdflow-{pool}"


def limit_exists(client: Any, pool: str) -> bool:
    """Whether the server has the limit of a pool."""
    from prefect.exceptions import ObjectNotFound  # noqa: PLC0415 - loaded by now

    try:
        client.read_global_concurrency_limit_by_name(limit_name(pool))
    except ObjectNotFound:
        return False
    return True


def _automations(client: Any) -> list[Any]:
    found: list[Any] = client.read_automations_by_name(AUTOMATION)
    return found


def _automation() -> Any:
    from prefect.client.schemas.objects import StateType  # noqa: PLC0415 - loaded by now
    from prefect.events.actions import ChangeFlowRunState  # noqa: PLC0415
    from prefect.events.schemas.automations import (  # noqa: PLC0415
        AutomationCore,
        EventTrigger,
        Posture,
    )
    from prefect.events.schemas.events import ResourceSpecification  # noqa: PLC0415

    return AutomationCore(
        name=AUTOMATION,
        description="A flow run whose process was killed stays as running; kdflow service remove.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_S),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message=f"no heartbeat within {SILENT_S:g} s",
                force=False,
            )
        ],
    )
