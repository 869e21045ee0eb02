"""Commands that look at runs which have come to their end: `kdflow history`, `kdflow compare`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from configs.errors import ConfigError
from flows.json_output import AsJson, print_lines
from flows.store_commands import DEFAULTS, Root, Scratch
from storage.store import ArtifactStore
from tasks.execution.progress import clock
from tasks.presentation.history import FinishedRun, chosen_runs, finished_runs, latest_run
from tasks.presentation.results import report_path, share_of_right_answers

console = Console()


def history(
    root: Root = DEFAULTS.root,
    scratch: Scratch = DEFAULTS.scratch,
    name: Annotated[str | None, typer.Option(help="Runs of this name alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs that have come to their end, with their students' held-out scores."""
    store = ArtifactStore(root=root, scratch=scratch)
    runs = finished_runs(store)
    runs = [run for run in runs if name in (None, run.record.name)]
    if as_json:
        print_lines(map(_plain, runs))
        return
    table = Table(
        Column("run", no_wrap=True), "started", "time", "KL", "95 %", "top-1", "perplexity", "right"
    )
    counting = {name: latest_run(store, name) for name in {run.record.name for run in runs}}
    for run in runs:
        scores, interval = run.scores, run.scores.get("intervals", {}).get("forward_kl")
        right = share_of_right_answers(scores)
        table.add_row(
            f"{run.id} *" if run.id == counting[run.record.name] else run.id,
            run.record.created_at[:16].replace("T", " "),
            clock(run.seconds),
            f"{scores['forward_kl']:.4f}",
            "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            f"{scores['agreement']:.1%}",
            f"{scores['perplexity']:.2f}",
            "-" if right is None else f"{right:.1%}",
        )
    console.print(table)
    console.print("* promoted: student.start=latest goes on with its student")


def compare(
    runs: Annotated[list[str], typer.Argument(help="Ids of `kdflow history`, or names.")],
    root: Root = DEFAULTS.root,
    scratch: Scratch = DEFAULTS.scratch,
    output: Annotated[Path, typer.Option(help="The page that is written.")] = Path("compare.html"),
) -> None:
    """Write a page with runs side by side: scores with intervals, curves, configs, answers."""
    from tasks.presentation.compare_page import write_comparison  # noqa: PLC0415 - matplotlib

    store = ArtifactStore(root=root, scratch=scratch)
    chosen = chosen_runs(store, runs)
    if len({run.id for run in chosen}) < 2:
        raise ConfigError(f"{', '.join(runs)}: give two runs or more; kdflow history lists them")
    write_comparison(store, chosen, output)
    typer.echo(f"{output.absolute()}")


def report(
    name: Annotated[str, typer.Argument(help="An id of `kdflow history`, or a run's name.")],
    root: Root = DEFAULTS.root,
    scratch: Scratch = DEFAULTS.scratch,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser, too.")] = False,
) -> None:
    """Say where the report of a finished run is."""
    store = ArtifactStore(root=root, scratch=scratch)
    (run,) = chosen_runs(store, [name])
    path = report_path(store, run.refs["report"])
    typer.echo(f"{path}")
    if show and not webbrowser.open(path.as_uri()):
        raise ConfigError(f"no browser can be opened here; the report is {path}")


def _plain(run: FinishedRun) -> dict[str, object]:
    return {
        "run": run.id,
        "name": run.record.name,
        "started": run.record.created_at,
        "seconds": run.seconds,
        "student": run.refs["train"].uri,
        "evaluation": run.refs["evaluate"].uri,
        "scores": run.scores,
    }
