"""Whether the Python functions that a run names are there, seen without running their files."""

import ast
from collections.abc import Iterator
from pathlib import Path

from configs.schema.base import file_and_name
from configs.schema.run import RunConfig
from kdflow_core.errors import DataError


def check_functions(run: RunConfig) -> None:
    """Raises DataError, which names the field."""
    for field, function in run.functions.items():
        file, name = file_and_name(function)
        try:
            tree = ast.parse(Path(file).read_text(encoding="utf-8"), filename=file)
        except OSError as error:
            raise DataError(f"{field}: {file} cannot be read: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{field}: {file} is no Python file: {error}") from error
        names = set(_bound(tree.body))
        if name not in names and "*" not in names:
            raise DataError(
                f"{field}: {file} has no function '{name}'; it has "
                f"{', '.join(sorted(names)) or 'none'}"
            )


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """What a module's statements give a name, in branches too."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in statement.names)
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    yield node.name
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    yield from (alias.asname or alias.name for alias in node.names)
