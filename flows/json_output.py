"""What commands say to programs: with `--json`, a JSON object a line, and nothing else.

Sizes are bytes, times seconds. Errors stay words, on the standard error output, with exit code 1.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: an object a line.")]


def print_lines(records: Iterable[Mapping[str, Any]]) -> None:
    """Each as one line."""
    for record in records:
        typer.echo(json.dumps(record))
