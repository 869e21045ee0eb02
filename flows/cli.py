"""The command `kdflow`."""

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, KdflowError
from configs.explain import Explained, explain
from configs.load import load_run, parse_overrides, recipe_names
from configs.printable import printable
from configs.schema.run import RunConfig
from configs.secrets import public, public_config
from flows import (
    export_command,
    history_commands,
    import_command,
    init_command,
    service_commands,
    show_commands,
    store_commands,
)
from flows.foreground import Foreground, foreground
from flows.json_output import AsJson, print_lines
from flows.prefect_api import configured_api, load_prefect, prefect_api
from storage.artifact import ArtifactRef
from tasks.checks.anew import forget_from
from tasks.checks.cluster_check import nodes_by_stage
from tasks.checks.run_check import (
    PlannedRun,
    all_artifacts,
    checked_plan,
    checked_run,
    models_are_checked,
    planned_run,
)
from tasks.execution.launch import warm_up
from tasks.forecast.estimate import Estimate, Prospect, check_room, with_delivery
from tasks.presentation.results import (
    SIDES,
    benchmark_rows,
    evaluation_rows,
    report_path,
    share_of_right_answers,
    student_path,
    with_error,
)
from tasks.stages.explanation import stage_status
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages, record_stages

app = typer.Typer(
    help="Knowledge distillation of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store_commands.app, name="store")
app.add_typer(show_commands.app, name="show")
app.add_typer(service_commands.app, name="service")
app.command()(init_command.init)
app.command()(export_command.export)
app.command("import-config")(import_command.import_config)
app.command()(history_commands.history)
app.command()(history_commands.compare)
app.command()(history_commands.report)
console = Console()
RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
OverrideArgument = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, for instance student.lr=1e-4")
]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverrideArgument = None,
    first: Annotated[
        str | None,
        typer.Option("--from", help="Make this stage and those behind it anew, from nothing."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the flow `kd` here and now, without a server to start by hand."""
    with foreground(["kdflow", "run", recipe, *(overrides or [])]) as process:
        settings = parse_overrides(overrides or [])
        # What cannot work is refused before Prefect starts.
        config = checked_run(recipe, settings)
        if not models_are_checked(config):
            warm_up(config)  # loads on one core, while Prefect loads on another
            load_prefect()
        planned = PlannedRun(run=config, stages=checked_plan(config, download=True))
        if first is not None:
            removed = forget_from(config, planned.stages, first)
            made = ", ".join(removed) or "what was not there yet"
            typer.echo(f"made anew: {made}", err=as_json)
        there = all_artifacts(planned)
        if there is None:
            warm_up(config, planned.stages.values())
        if there is None or configured_api() is not None:
            done = _run_flow(planned, recipe, settings, process)
        else:  # nobody could look at what a temporary server says of it
            record_stages(planned.run, planned.stages)
            typer.echo(f"served from cache: {', '.join(planned.stages)}", err=as_json)
            done = there
    store = open_store(config)
    rows, benchmarks = evaluation_rows(store, done["evaluation"]), benchmark_rows(store, done)
    paths = {
        "student": str(student_path(store, done["student"])),
        "report": str(report_path(store, done["report"])),
    }
    if as_json:
        artifacts = {name: ref.name for name, ref in done.items()}
        record = {**paths, "artifacts": artifacts, "evaluation": rows}
        print_lines([record | ({"benchmarks": benchmarks} if benchmarks else {})])
        return
    console.print(score_table(rows))
    if benchmarks:
        console.print(benchmark_table(benchmarks))
    _print_paths(paths)


def _run_flow(
    planned: PlannedRun, recipe: str, settings: dict[str, Any], process: Foreground
) -> dict[str, ArtifactRef]:
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_expected_traceback)
    with prefect_api(process.died):
        from flows.kd import given_run, kd  # noqa: PLC0415 - Prefect takes seconds to import

        with given_run(planned):
            done: dict[str, ArtifactRef] = kd(recipe=recipe, overrides=public(settings))
    return done


@app.command()
def worker(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(help="A stage's name, as `kdflow plan` has it.")],
    overrides: OverrideArgument = None,
) -> None:
    """Be one rank of a stage, where torchrun or another scheduler starts the ranks.

    Its place is in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. What the stage needs
    is in the store already. A SIGTERM has training save first; the exit code is 75 then.
    """
    with foreground(["kdflow", "worker", recipe, stage, *(overrides or [])]):
        from tasks.execution.scheduled_rank import run_scheduled_rank  # noqa: PLC0415 - loads torch

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        planned = planned_run(recipe, parse_overrides(overrides or []), download=True)
        run_scheduled_rank(planned, stage, os.environ)


@app.command()
def plan(
    recipe: RecipeArgument, overrides: OverrideArgument = None, as_json: AsJson = False
) -> None:
    """Say which stages would be served from cache, and what changed for the others."""
    planned = planned_run(recipe, parse_overrides(overrides or []), download=False)
    statuses = stage_status(planned.run, planned.stages)
    if as_json:
        print_lines(
            {
                "stage": status.identity.name,
                "artifact": f"{status.identity.kind}/{status.identity.digest}",
                "cached": status.cached,
                "reasons": status.reasons,
            }
            for status in statuses
        )
        return
    table = Table("stage", "artifact", "status", "reason", title=f"plan of {planned.run.name}")
    for status in statuses:
        identity = status.identity
        table.add_row(
            identity.name,
            f"{identity.kind}/{identity.digest[:12]}",
            "will be served from cache" if status.cached else "will run",
            "\n".join(status.reasons),
        )
    console.print(table)


@app.command()
def estimate(
    recipe: RecipeArgument, overrides: OverrideArgument = None, as_json: AsJson = False
) -> None:
    """Say what a run will take, and whether live or replay is cheaper: from a short probe.

    Prepares and tokenizes, which a run needs anyway. Fails when the states will not fit the disk.
    """
    from tasks.forecast.run_estimate import estimate as measure  # noqa: PLC0415 - loads torch

    config = checked_run(recipe, parse_overrides(overrides or []))
    if config.mode == "onpolicy":
        raise ConfigError(
            "kdflow estimate is about `mode: offpolicy`; an on-policy run says what memory it "
            "takes when it starts, and after each round how long that took"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found, outcome = measure(config, logging.getLogger("kdflow"))
    places = nodes_by_stage(config, plan_stages(with_delivery(config, outcome.delivery)).values())
    if as_json:
        figures = found.model_dump(mode="json") | outcome.model_dump(mode="json")
        print_lines([figures | {"nodes": places}])
    else:
        console.print(estimate_table(config, found, outcome, places))
    check_room(config, outcome)


@app.command("config")
def show_config(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")] = "",
    overrides: OverrideArgument = None,
    explain_fields: Annotated[
        bool, typer.Option("--explain", help="Say what each field is for, instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a recipe with overrides and defaults filled in; with --explain, what each field is for:
    all fields, or those whose names begin with the given prefix.
    """
    if explain_fields:
        fields = explained(recipe)
        if as_json:
            print_lines(map(asdict, fields))
            return
        console.print(field_table(fields))
        return
    if not recipe:
        raise ConfigError("give a recipe's name, or a YAML file; `kdflow recipes` lists those here")
    config = public_config(load_run(recipe, parse_overrides(overrides or [])))
    if as_json:
        print_lines([config])
        return
    typer.echo(yaml.safe_dump(config, sort_keys=False))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship with kdflow."""
    if as_json:
        print_lines({"recipe": name} for name in recipe_names())
        return
    for name in recipe_names():
        typer.echo(name)


@app.command()
def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(help="What each node of a Ray cluster has, instead: HOST:PORT or `auto`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what works on this machine. Fails when nothing does, or a node is not alike."""
    from tasks.forecast.doctor import examine, examine_cluster  # noqa: PLC0415 - loads torch

    findings = examine(Path.cwd()) if cluster is None else examine_cluster(cluster)
    if as_json:
        print_lines(map(asdict, findings))
    else:
        table = Table("", "", "works")
        for finding in findings:
            works = {None: "", True: "yes", False: "no"}[finding.works]
            table.add_row(finding.what, finding.detail, works)
        console.print(table)
    judged = [finding.works for finding in findings if finding.works is not None]
    if not (any(judged) if cluster is None else all(judged)):
        raise typer.Exit(1)


def _without_expected_traceback(record: logging.LogRecord) -> bool:
    """Errors meant for the user are shown as their message alone."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, KdflowError) and error.expected:
        record.exc_info = None
        record.msg, record.args = f"{type(error).__name__}: {error}", ()
    return True


def score_table(rows: list[dict[str, Any]]) -> Table:
    """The held-out scores over all sources."""
    table = Table(title="held-out evaluation (KL to the teacher in nats/token)")
    table.add_column("model", no_wrap=True)
    # Perplexities of two tokenizers do not compare; bits per byte of the text do.
    by_bytes = any(row["bits_per_byte"] is not None for row in rows)
    text, form = ("bits_per_byte", ".4f") if by_bytes else ("perplexity", ".2f")
    for title in ("forward KL", "reverse KL", "same top-1", text.replace("_", " "), "answers"):
        table.add_column(title, justify="right")
    for row in rows:
        if row["source"] == "all":
            table.add_row(
                row["model"],
                _number(row["forward_kl"], ".4f"),
                _number(row["reverse_kl"], ".4f"),
                _number(row["agreement"], ".1%"),
                _number(row[text], form),
                _number(share_of_right_answers(row), ".1%"),
            )
    return table


def benchmark_table(rows: list[dict[str, Any]]) -> Table:
    """What teacher and student have of each benchmark, with standard errors."""
    table = Table("task", "metric", *SIDES, title="benchmarks (LM Evaluation Harness)")
    for row in rows:
        table.add_row(row["task"], row["metric"], *(with_error(row[side]) for side in SIDES))
    return table


def estimate_table(
    run: RunConfig, found: Estimate, outcome: Prospect, places: dict[str, str]
) -> Table:
    """An estimate for people."""
    table = Table("", "", title=f"estimate of {run.name}, {run.planned_runs} runs planned")
    size_of = store_commands.size_text
    for name, size in outcome.stored_bytes.items():
        per_token = f"{size / max(1, found.rows):,.0f} bytes per supervised token"
        lossy = f", KL {found.int8_kl:.1e} nats" if name == "int8" else ""
        chosen = " (chosen)" if name == run.storage.codec else ""
        table.add_row(f"states as {name}{chosen}", f"{size_of(size)}, {per_token}{lossy}")
    free = "unknown" if outcome.free_bytes is None else size_of(outcome.free_bytes)
    table.add_row(
        "free in the store", f"{free}; the states {'fit' if outcome.fits else 'do not fit'}"
    )
    rows = {
        "distinct sequences": f"{found.sequences:,}, {found.replay_tokens:,} teacher tokens, "
        f"{found.rows:,} supervised",
        "training": f"{found.steps:,} steps, {found.student_tokens:,} student tokens at "
        f"{found.student_rate:,.0f} tokens/s: {duration(outcome.train_s)}",
        "teacher, to store its states": f"{found.teacher_rate:,.0f} tokens/s a copy: "
        f"{duration(outcome.extract_s)}, once",
        "of that, from other runs": f"{outcome.known:.0%} of its tokens, not counted in",
        "teacher, live": f"{duration(outcome.live_teacher_s)} per run",
        "replay in all": duration(outcome.replay_s),
        "live in all": duration(outcome.live_s),
        "delivery: auto": f"{outcome.delivery}: {outcome.reason}",
        **places,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def explained(prefix: str) -> list[Explained]:
    """The fields of the config whose names begin with something. Raises ConfigError."""
    fields = [field for field in explain() if field.name.startswith(prefix)]
    if not fields:
        raise ConfigError(
            f"no field's name begins with '{prefix}'; `kdflow config --explain` has all"
        )
    return fields


def field_table(fields: list[Explained]) -> Table:
    """Fields of the config for people."""
    table = Table("field", "default", "meaning")
    for field in fields:
        table.add_row(field.name, field.default or "", field.text)
    return table


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_paths(paths: dict[str, str]) -> None:
    for name, path in paths.items():
        typer.echo(f"{name}: {path}")


def main() -> None:
    """The entry point: errors meant for the user are one message and exit code 1."""
    try:
        app()
    except KdflowError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(1)
