"""Small readable results of finished stages, for flows and the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdflow_core.errors import ModelError
from storage.artifact import ArtifactRef
from storage.store import ArtifactStore

EVALUATION_FILE = "evaluation.json"
SIDES = ("teacher", "student")
BENCHMARKS_FILE = "benchmarks.json"
REPORT_FILE = "report.html"
SCORE_COLUMNS = (
    "forward_kl",
    "reverse_kl",
    "agreement",
    "perplexity",
    "bits_per_byte",
    "exact_match",
    "accepted",
)


def artifact_key(name: str) -> str:
    """A run's name as keys of Prefect artifacts allow it: lower case with dashes only."""
    return name.replace("_", "-").replace(".", "-")


def read_evaluation(store: ArtifactStore, ref: ArtifactRef) -> dict[str, Any]:
    """An evaluation's scores and samples."""
    path = store.local_copy(ref) / EVALUATION_FILE
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return evaluation


def share_of_right_answers(scores: Mapping[str, Any]) -> float | None:
    """By the run's verifier where it has one, else by the data's answers; None without either."""
    accepted, matching = scores.get("accepted"), scores.get("exact_match")
    return matching if accepted is None else accepted


def evaluation_rows(store: ArtifactStore, ref: ArtifactRef) -> list[dict[str, Any]]:
    """One row per model and source (`all` first), with the scores that exist."""
    models = read_evaluation(store, ref)["models"]
    sources = sorted(
        {s for scores in models.values() for s in scores}, key=lambda s: (s != "all", s)
    )
    rows = []
    for source in sources:
        for model, scores in models.items():
            if source in scores:
                row: dict[str, Any] = {"source": source, "model": model}
                row |= {name: scores[source].get(name) for name in SCORE_COLUMNS}
                rows.append(row)
    return rows


def benchmark_rows(store: ArtifactStore, made: Mapping[str, ArtifactRef]) -> list[dict[str, Any]]:
    """One row per metric of a benchmark, with what `teacher` and `student` have of it: the value
    and its standard error, each None where there is none.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for side in SIDES:
        ref = made.get(f"{side}_benchmarks")
        if ref is None:
            continue
        path = store.local_copy(ref) / BENCHMARKS_FILE
        for record in json.loads(path.read_text(encoding="utf-8")):
            name = (record["task"], record["metric"])
            row = {"task": name[0], "metric": name[1], "documents": record["documents"]}
            own = rows.setdefault(name, row | {"teacher": None, "student": None})
            own[side] = {"value": record["value"], "stderr": record["stderr"]}
    return list(rows.values())


def with_error(found: Mapping[str, float | None] | None) -> str:
    """A value of a benchmark with its standard error, as text."""
    if found is None:
        return "-"
    error = found["stderr"]
    return f"{found['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def report_path(store: ArtifactStore, ref: ArtifactRef) -> Path:
    """The HTML report as a local file."""
    return store.local_copy(ref) / REPORT_FILE


def student_path(store: ArtifactStore, ref: ArtifactRef) -> Path:
    """The trained student as a local Hugging Face folder. Raises ModelError when it is not one."""
    path = store.local_copy(ref) / "model"
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a model folder")
    return path
