"""The command `kdflow`."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from configs.load import ConfigError, load_run, parse_overrides, recipe_names
from flows import store_commands
from kdflow_core.errors import KdflowError
from storage.errors import StoreError
from tasks.results import check_run, evaluation_rows, report_path, student_path
from tasks.stages import plan_stages, stage_status

app = typer.Typer(
    help="Knowledge distillation of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_commands.app, name="store")
console = Console()
EXPECTED = (ConfigError, KdflowError, StoreError)
RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
OverrideArgument = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, for instance student.lr=1e-4")
]


@app.command()
def run(recipe: RecipeArgument, overrides: OverrideArgument = None) -> None:
    """Run the flow `kd` here and now, without a server to start by hand."""
    settings = parse_overrides(overrides or [])
    config = check_run(recipe, settings)
    plan_stages(config)  # data or models that are not there are refused before Prefect starts
    # A cold ephemeral server needs more than Prefect's 20 seconds on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_expected_traceback)
    from flows.kd import kd  # noqa: PLC0415 - importing Prefect reads the settings above

    done = kd(recipe=recipe, overrides=settings)
    console.print(score_table(evaluation_rows(config, done["evaluation"])))
    _print_paths(
        {
            "student": str(student_path(config, done["student"])),
            "report": str(report_path(config, done["report"])),
        }
    )


@app.command()
def plan(recipe: RecipeArgument, overrides: OverrideArgument = None) -> None:
    """Say which stages would be served from cache, and what changed for the others."""
    config = check_run(recipe, parse_overrides(overrides or []))
    table = Table("stage", "artifact", "would", "why", title=f"plan of {config.name}")
    for status in stage_status(config):
        identity = status.identity
        table.add_row(
            identity.stage,
            f"{identity.kind}/{identity.digest[:12]}",
            "be served from cache" if status.cached else "run",
            "\n".join(status.reasons),
        )
    console.print(table)


@app.command("config")
def show_config(recipe: RecipeArgument, overrides: OverrideArgument = None) -> None:
    """Print a recipe with overrides and defaults filled in."""
    config = load_run(recipe, parse_overrides(overrides or []))
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


@app.command()
def recipes() -> None:
    """List the recipes that ship with kdflow."""
    for name in recipe_names():
        typer.echo(name)


@app.command()
def doctor() -> None:
    """Say what works on this machine. Fails when no teacher backend does."""
    from tasks.doctor import examine  # noqa: PLC0415 - loads torch and SGLang

    findings = examine(Path.cwd())
    table = Table("", "", "works")
    for finding in findings:
        works = {None: "", True: "yes", False: "no"}[finding.works]
        table.add_row(finding.what, finding.detail, works)
    console.print(table)
    if not any(finding.works for finding in findings):
        raise typer.Exit(1)


def _without_expected_traceback(record: logging.LogRecord) -> bool:
    """Errors meant for the user are shown as their message alone."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, EXPECTED) and getattr(error, "expected", True):
        record.exc_info = None
        record.msg, record.args = f"{type(error).__name__}: {error}", ()
    return True


def score_table(rows: list[dict[str, Any]]) -> Table:
    """The held-out scores over all sources."""
    table = Table(title="held-out evaluation (KL to the teacher in nats/token)")
    table.add_column("model", no_wrap=True)
    for title in ("forward KL", "reverse KL", "same top-1", "perplexity", "answers"):
        table.add_column(title, justify="right")
    for row in rows:
        if row["source"] == "all":
            table.add_row(
                row["model"],
                _number(row["forward_kl"], ".4f"),
                _number(row["reverse_kl"], ".4f"),
                _number(row["agreement"], ".1%"),
                _number(row["perplexity"], ".2f"),
                _number(row["exact_match"], ".1%"),
            )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_paths(paths: dict[str, str]) -> None:
    for name, path in paths.items():
        typer.echo(f"{name}: {path}")


def main() -> None:
    """The entry point: errors meant for the user are one message and exit code 1."""
    try:
        app()
    except EXPECTED as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
