"""Rules about the code itself: layers, sizes, names, documented packages."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from configs.schema.loss import SingleDivergence
from kdflow_core.losses import LOSSES

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "storage", "kdflow_core", "tasks", "flows")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def test_import_contracts() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


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
        ("tasks.stages", ("torch", "prefect", "transformers")),
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
