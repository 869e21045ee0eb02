"""Runs side by side: one self-contained file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdflow_core.metrics import STEP_METRICS, Metric
from storage.store import ArtifactStore
from tasks.presentation.history import STUDENT, FinishedRun
from tasks.presentation.pages import curve, page_template
from tasks.presentation.report_page import HELDOUT_CURVE, HELDOUT_SERIES
from tasks.presentation.results import read_evaluation, share_of_right_answers
from tasks.presentation.sample_scores import differences, read_sums
from tasks.presentation.tracking import HELDOUT_FILE, METRICS_FILE, read_metrics

COLUMNS = {
    "forward_kl": "forward KL (nats/token)",
    "reverse_kl": "reverse KL (nats/token)",
    "agreement": "top-1 agreement",
    "cross_entropy": "cross-entropy of the text (nats/token)",
}
ABSENT = "-"


def config_differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The fields in which not all configs are alike, with the value of each."""
    flat = [_flat("", config) for config in configs]
    names = dict.fromkeys(name for own in flat for name in own)
    rows = [(name, [own.get(name, ABSENT) for own in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Dotted names of all that is no mapping and no list of any."""
    named: dict[str, Any] = {}
    if isinstance(value, dict):
        named = value
    elif isinstance(value, list) and any(isinstance(own, dict) for own in value):
        named = {str(number): own for number, own in enumerate(value)}
    if not named:
        return {prefix.removesuffix("."): str(value)}
    flat: dict[str, str] = {}
    for key, own in named.items():
        flat |= _flat(f"{prefix}{key}.", own)
    return flat


def write_comparison(store: ArtifactStore, runs: Sequence[FinishedRun], target: Path) -> None:
    """Render the page; the first run is what the others are compared with. Raises ConfigError for
    one that an earlier version has evaluated.
    """
    sums = [read_sums(store.local_copy(run.refs["evaluate"]), STUDENT) for run in runs]
    rows = []
    for run, own in zip(runs, sums, strict=True):
        found = differences(sums[0], own)
        rows.append(
            {
                "id": run.id,
                "means": _means(run),
                "right": share_of_right_answers(run.scores),
                "differences": found,
                "samples": found["forward_kl"].samples,
            }
        )
    page = page_template("compare.html.jinja").render(
        rows=rows,
        columns=COLUMNS,
        figures=_figures(store, runs),
        config=config_differences([run.config for run in runs]),
        samples=_samples([read_evaluation(store, run.refs["evaluate"]) for run in runs]),
    )
    target.write_text(page, encoding="utf-8")


def _means(run: FinishedRun) -> dict[str, tuple[float, list[float] | None]]:
    scores = run.scores
    intervals = scores.get("intervals", {})
    known = scores | {"cross_entropy": float(np.log(scores["perplexity"]))}
    return {name: (known[name], intervals.get(name)) for name in COLUMNS}


def _figures(store: ArtifactStore, runs: Sequence[FinishedRun]) -> list[str]:
    folders = [store.local_copy(run.refs["train"]) for run in runs]
    labels = [run.id for run in runs]
    steps = [read_metrics(folder / METRICS_FILE) for folder in folders]
    heldout = [read_metrics(folder / HELDOUT_FILE) for folder in folders]
    wanted = [(_title(metric), metric.name, steps) for metric in STEP_METRICS]
    wanted += [(f"{HELDOUT_CURVE}: {legend}", name, heldout) for name, legend in HELDOUT_SERIES]
    figures = []
    for title, name, records in wanted:
        series = [
            (label, own, name)
            for label, own in zip(labels, records, strict=True)
            if any(name in record for record in own)
        ]
        if series:
            figures.append(curve(title, series))
    return figures


def _title(metric: Metric) -> str:
    """The report has several metrics in a figure; here each has its own."""
    alone = [own.figure for own in STEP_METRICS].count(metric.figure) == 1
    return metric.figure if alone else f"{metric.figure}: {metric.legend}"


def _samples(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts that the students of all runs have answered, with their answers."""
    answers = [
        {sample["prompt"]: sample for sample in evaluation["samples"]} for evaluation in evaluations
    ]
    shared = [
        prompt
        for prompt in answers[0]
        if all(prompt in own and STUDENT in own[prompt] for own in answers)
    ]
    return [
        {
            "prompt": prompt,
            "label": answers[0][prompt]["label"],
            "answers": [own[prompt][STUDENT] for own in answers],
        }
        for prompt in shared
    ]
