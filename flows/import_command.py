"""`kdflow import-config`: a recipe from the settings of another program."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from configs.foreign import imported
from configs.foreign.programs import read_settings
from configs.load import load_run
from configs.text import read_text

console = Console()


def import_config(
    settings: Annotated[
        Path, typer.Argument(help="A script with KDFlow's flags, or TRL's GKD config as YAML.")
    ],
    output: Annotated[Path, typer.Argument(help="The recipe that is written.")] = Path(
        "imported.yaml"
    ),
) -> None:
    """Write a recipe from KDFlow's flags or TRL's GKD config, and say what became of each."""
    if output.exists():
        raise ConfigError(f"{output} is there already; give another name, or remove it")
    if not settings.is_file():
        raise ConfigError(f"there is no file {settings}")
    found = imported(read_settings(read_text(settings), settings.name))
    table = Table(found.program, "kdflow")
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    output.write_text(yaml.safe_dump(found.recipe, sort_keys=False), encoding="utf-8")
    for warning in found.warnings:
        typer.echo(f"look at this: {warning}")
    try:
        load_run(str(output), {})
    except ConfigError as error:
        raise ConfigError(f"{output} is written, and not complete yet; {error}") from error
    typer.echo(f"{output} is written; now:\n  kdflow plan {output}")
