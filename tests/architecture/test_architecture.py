"""Rules about the code itself: layers, sizes, names, documented packages."""

import ast
import dataclasses
import importlib
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from configs.schema.loss import SingleDivergence
from kdflow_core.losses import LOSSES

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "storage", "kdflow_core", "tasks", "flows")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
HABITUAL_FILE_LINES, HABITUAL_FUNCTION_LINES = 400, 60
MOST_FILE_LINES, MOST_FUNCTION_LINES = 600, 100
# Wherever it stands: what the members of a package have in common; its errors; the adapter to a
# library.
ONE_MEANING = {"__init__.py", "__main__.py", "base.py", "errors.py", "hf.py", "sglang.py"}


def test_import_contracts() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.filterwarnings("default:over the habit")
def test_sizes() -> None:
    """About 400 lines a file and 60 a function are a habit, which is told; what has clearly
    outgrown a reader fails.
    """
    sizes = [(str(path.relative_to(ROOT)), lines) for path, lines in _file_lines()]
    functions = [(f"{path.relative_to(ROOT)}:{name}", lines) for path, name, lines in _functions()]
    over = [entry for entry in sizes if entry[1] > HABITUAL_FILE_LINES]
    over += [entry for entry in functions if entry[1] > HABITUAL_FUNCTION_LINES]
    for name, lines in over:
        warnings.warn(f"over the habit: {name} has {lines} lines", stacklevel=1)
    assert [entry for entry in sizes if entry[1] > MOST_FILE_LINES] == []
    assert [entry for entry in functions if entry[1] > MOST_FUNCTION_LINES] == []


def _file_lines() -> Iterator[tuple[Path, int]]:
    for path in SOURCES:
        yield path, len(path.read_text().splitlines())


def _functions() -> Iterator[tuple[Path, str, int]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node.name, (node.end_lineno or 0) - node.lineno + 1


def test_no_file_name_has_two_meanings() -> None:
    names = Counter(path.name for path in SOURCES)
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= ONE_MEANING, "name a file after its subject"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_names_are_ours(package: str) -> None:
    """Generic names such as `tasks` must not resolve to somebody else's package."""
    origin = importlib.import_module(package).__file__
    assert origin is not None
    assert Path(origin).is_relative_to(ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_owns(package: str) -> None:
    text = (ROOT / package / "README.md").read_text()
    for heading in ("## Owns", "## May import", "## Where to add"):
        assert heading in text


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("configs.load", ("torch", "prefect", "zarr", "transformers")),
        ("tasks.stages.planning", ("torch", "prefect", "transformers")),
        ("tasks.rounds.rounds_at_work", ("torch", "prefect", "transformers")),
        ("tasks.jobs.reporting", ("torch", "prefect", "transformers", "datasets")),
        ("flows.cli", ("torch", "prefect", "transformers")),
        ("flows.kd", ("torch", "transformers")),
        ("storage.store", ("torch", "prefect")),
    ],
)
def test_light_modules_load_no_heavy_library(module: str, absent: tuple[str, ...]) -> None:
    """`kdflow plan` answers at once, and a cached run never loads torch."""
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_only_one_place_divides_the_loss() -> None:
    dividing = [p for p in SOURCES if "/ batches.num_tokens" in p.read_text()]
    assert [p.name for p in dividing] == ["step.py"]


def test_every_divergence_has_schema_class_and_test() -> None:
    union = get_args(get_args(SingleDivergence)[0])
    schemas = {cls.model_fields["type"].default: cls for cls in union}
    assert schemas.keys() == LOSSES.keys()
    numerics = "".join(path.read_text() for path in (ROOT / "tests/numerics").glob("*.py"))
    papers = (ROOT / "kdflow_core/losses/README.md").read_text()
    for name, cls in LOSSES.items():
        fields = set(schemas[name].model_fields) - {"type"}
        assert fields == {field.name for field in dataclasses.fields(cls)}
        assert cls.needs_whole_vocabulary == schemas[name].NEEDS_WHOLE_VOCABULARY
        assert f'"{name}"' in numerics
        assert f"| `{name}` |" in papers


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/benchmarks").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_benchmarks_load(path: Path) -> None:
    """They are run by hand, and move with what they measure."""
    importlib.import_module(f"tests.benchmarks.{path.stem}")
