"""The commands `kdflow store ...`."""

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from configs.schema.run import StorageConfig
from flows.json_output import AsJson, print_lines
from storage.errors import StoreError
from storage.maintenance import (
    Entry,
    damages,
    entries,
    find_entry,
    find_garbage,
    manifest_text,
    remove_artifact,
    remove_damaged,
    remove_garbage,
)
from storage.runs import forget_run, list_runs
from storage.store import ArtifactStore
from storage.transfer import export_artifact, import_artifact
from tasks.checks.store_check import descendants, remove_from_scratch, scratch_damages, take_back

DEFAULTS = StorageConfig()
SHORT = 12
app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)
console = Console()
Name = Annotated[
    str, typer.Argument(help="The beginning of an artifact's digest, with or without `kind/`.")
]
Root = Annotated[str, typer.Option(help="As storage.root.")]
Scratch = Annotated[str, typer.Option(help="As storage.scratch.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.callback()
def store_options(
    context: typer.Context,
    root: Root = DEFAULTS.root,
    scratch: Scratch = DEFAULTS.scratch,
) -> None:
    """Look after the artifact store."""
    context.obj = ArtifactStore(root=root, scratch=scratch)


@app.command("ls")
def ls(context: typer.Context, as_json: AsJson = False) -> None:
    """List what is in the store: size, age, and the runs that use it."""
    store: ArtifactStore = context.obj
    found = entries(store)
    if as_json:
        print_lines(map(_plain, found))
        return
    table = Table("artifact", "size", "age", "state", "runs", title=f"{store.root}")
    for entry in found:
        table.add_row(
            f"{entry.kind}/{entry.digest[:SHORT]}",
            size_text(entry.num_bytes),
            age_text(time.time() - entry.modified) if entry.modified else "-",
            entry.state,
            "\n".join(entry.runs),
        )
    console.print(table)
    total = sum(entry.num_bytes for entry in found)
    console.print(f"{len(found)} artifacts, {size_text(total)}; {len(list_runs(store))} runs")


@app.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Print an artifact's manifest, without its list of files."""
    entry = _finished(context.obj, name)
    assert entry.manifest is not None
    if as_json:
        manifest = entry.manifest.model_dump(mode="json", exclude={"files"})
        print_lines([{**_plain(entry), "manifest": manifest}])
        return
    typer.echo(manifest_text(entry.manifest))
    typer.echo(f"files: {len(entry.manifest.files)}, {size_text(entry.manifest.num_bytes)}")
    typer.echo(f"runs: {', '.join(entry.runs) or 'none'}")


@app.command()
def verify(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Artifacts; all without one.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged, to be computed again.")
    ] = False,
) -> None:
    """Read everything and check every checksum, those of checkpoints and copies in the scratch
    folder too. With `--repair`, what was made of something damaged is made again as well. Exit code
    1 when something is damaged.
    """
    store: ArtifactStore = context.obj
    known = entries(store)
    chosen = [_finished(store, n) for n in names] if names else known
    damaged = [entry for entry in chosen if _is_damaged(store, entry, repair=repair)]
    for entry in descendants(known, damaged):
        typer.echo(f"{_title_of(entry)}: made of what is damaged")
        if repair:
            take_back(store, entry)
            typer.echo(f"{_title_of(entry)}: taken back; the next run makes it again")
    in_scratch = [] if names else list(scratch_damages(store))
    for path, how in in_scratch:
        typer.echo(f"{path}: {how}")
        if repair:
            remove_from_scratch(path)
            typer.echo(f"{path}: removed")
    if damaged or in_scratch:
        raise typer.Exit(1)


def _is_damaged(store: ArtifactStore, entry: Entry, *, repair: bool) -> bool:
    """Say whether an artifact is whole; with `repair`, remove what is not."""
    title = _title_of(entry)
    if entry.manifest is None:
        typer.echo(f"{title}: {entry.state}, not read")
        if entry.state == "unfinished":
            return False
        if repair:
            store.retract(entry.kind, entry.digest)
            typer.echo(f"{title}: removed its manifest; the next run makes it again")
        return True
    bad = list(damages(store, entry))
    for record, how in bad:
        typer.echo(f"{title}: {record.path} {how}")
    if not bad:
        read = size_text(entry.manifest.num_bytes)
        typer.echo(f"{title}: {len(entry.manifest.files)} files, {read}, whole")
    elif repair:
        remove_damaged(store, entry, [record for record, _ in bad])
        typer.echo(f"{title}: removed {len(bad)} files; the next run computes them again")
    return bool(bad)


def _plain(entry: Entry) -> dict[str, Any]:
    """An artifact for programs."""
    return {
        "artifact": entry.name,
        "bytes": entry.num_bytes,
        "age_s": round(time.time() - entry.modified) if entry.modified else None,
        "state": entry.state,
        "runs": entry.runs,
    }


def _title_of(entry: Entry) -> str:
    return f"{entry.kind}/{entry.digest[:SHORT]}"


@app.command()
def rm(context: typer.Context, name: Name, yes: Yes = False) -> None:
    """Remove an artifact, or, given a run's name as `ls` shows it, forget the run."""
    store: ArtifactStore = context.obj
    for run in list_runs(store):
        if run.id == name:
            forget_run(store, run)
            typer.echo(f"forgot the run {run.id}; `kdflow store gc` finds what only it used")
            return
    entry = find_entry(store, name)
    used = f" used by {', '.join(entry.runs)}" if entry.runs else ""
    if not yes:
        typer.confirm(f"Remove {entry.name}, {size_text(entry.own_bytes)}{used}?", abort=True)
    remove_artifact(store, entry)
    typer.echo(f"removed {entry.name}")


@app.command()
def gc(
    context: typer.Context,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; else only list it.")] = False,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Leave what was written more recently.")
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """List what no manifest and no run refers to; with `--delete`, remove it."""
    store: ArtifactStore = context.obj
    garbage = find_garbage(store, older_than_s=older_than_hours * 3600)
    for item in garbage:
        if as_json:
            print_lines([{"what": item.what, "why": item.why, "bytes": item.num_bytes}])
        else:
            typer.echo(f"{size_text(item.num_bytes):>10}  {item.what}: {item.why}")
        if delete:
            remove_garbage(store, item)
    if as_json:
        return
    total = size_text(sum(item.num_bytes for item in garbage))
    done = "removed" if delete else "to remove with --delete"
    typer.echo(f"{len(garbage)} things, {total}, {done}")


@app.command("export")
def export(
    context: typer.Context,
    name: Name,
    target: Annotated[str, typer.Argument(help="A tar file: a path or an fsspec URL.")],
) -> None:
    """Write an artifact to a tar file."""
    entry = _finished(context.obj, name)
    export_artifact(context.obj, entry, target)
    typer.echo(f"{entry.name} is in {target}")


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A tar file that `export` has written.")],
) -> None:
    """Read an exported artifact into the store."""
    ref = import_artifact(context.obj, source)
    typer.echo(f"{ref.kind}/{ref.digest} is in the store")


def _finished(store: ArtifactStore, name: str) -> Entry:
    entry = find_entry(store, name)
    if entry.manifest is None:
        raise StoreError(f"{entry.name} has no manifest: {entry.state}")
    return entry


def size_text(num_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def age_text(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
