"""The HTML report of a run: one self-contained file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.secrets import public_config
from kdflow_core.metrics import STEP_METRICS
from storage.artifact import Manifest
from storage.store import ArtifactStore
from tasks.execution.progress import clock
from tasks.presentation.pages import Points, curve, page_template
from tasks.presentation.results import benchmark_rows, read_evaluation, share_of_right_answers
from tasks.presentation.tracking import HELDOUT_FILE, METRICS_FILE, read_metrics
from tasks.rounds.round_record import RoundRecord, read_rounds
from tasks.stages.identity import StageSpec

HELDOUT_CURVE = "held-out KL (nats/token)"
HELDOUT_SERIES = (("reverse_kl", "reverse KL"), ("forward_kl", "forward KL"))
ROUND_CURVES = {
    HELDOUT_CURVE: HELDOUT_SERIES,
    "mean reward": (("reward", "reward"),),
    "mean length of answers (tokens)": (("length", "tokens"),),
}
MODELS = ("teacher", "student before", "student after")


def write_report(*, spec: StageSpec, store: ArtifactStore, target: Path) -> None:
    """Render the report from the run's manifests, metrics and evaluation."""
    manifests = {name: store.manifest(r.kind, r.digest) for name, r in spec.inputs.items()}
    student = store.local_copy(spec.inputs["student"])
    metrics, rounds = read_metrics(student / METRICS_FILE), read_rounds(student)
    evaluation = read_evaluation(store, spec.inputs["evaluation"])
    tokens, kept = manifests["tokens"], manifests["student"].info.get("kept_step")
    sources = [*tokens.info["read"]]
    page = page_template("report.html.jinja").render(
        name=spec.run.name,
        figures=_step_curves(metrics, read_metrics(student / HELDOUT_FILE), kept),
        kept_step=kept,
        kept_by=spec.run.eval.keep_best,
        rounds=rounds,
        round_figures=_round_curves(rounds),
        models=[m for m in MODELS if m in evaluation["models"]],
        sources=["all", *sources],
        scores=evaluation["models"],
        benchmarks=benchmark_rows(store, spec.inputs),
        right=share_of_right_answers,
        verifier=spec.run.eval.verifier,
        samples=evaluation["samples"],
        dropped=tokens.info["dropped"],
        read=tokens.info["read"],
        first_dropped=tokens.info["first_dropped"],
        nearly_trained_on=tokens.info.get("nearly_trained_on", 0),
        stages=[_stage_row(name, m) for name, m in manifests.items()],
        counts=tokens.counts,
        tokenizers=tokens.info["tokenizers"].removeprefix("alignment: "),
        coverage=tokens.info["alignment"],
        config=yaml.safe_dump(public_config(spec.run), sort_keys=False),
        versions=manifests["student"].versions,
    )
    target.write_text(page, encoding="utf-8")


def _step_curves(
    metrics: list[dict[str, Any]], heldout: list[dict[str, Any]], kept: int | None
) -> list[str]:
    """Figures over the optimizer steps, and of the held-out loss where it was measured, with the
    step whose student was `kept` if that was not the last.
    """
    figures: dict[str, tuple[tuple[str, str], ...]] = {}
    present = set().union(*metrics)
    for metric in (m for m in STEP_METRICS if m.name in present):
        own = figures.get(metric.figure, ())
        figures[metric.figure] = (*own, (metric.name, metric.legend))
    curves = [curve(title, _lines(series, metrics)) for title, series in figures.items()]
    if heldout:
        curves.append(curve(HELDOUT_CURVE, _lines(HELDOUT_SERIES, heldout), kept))
    return curves


def _lines(series: Sequence[tuple[str, str]], points: Points) -> list[tuple[str, Points, str]]:
    """Lines for `curve`, of (name, label) of the same points."""
    return [(label, points, name) for name, label in series]


def _round_curves(rounds: list[RoundRecord]) -> list[str]:
    """Figures over the rounds, of what these have."""
    points: list[dict[str, Any]] = []
    for record in rounds:
        point: dict[str, Any] = {"step": record.number, "length": record.mean_length}
        point |= record.heldout or {}
        if record.reward_mean is not None:
            point["reward"] = record.reward_mean
        points.append(point)
    return [
        curve(title, _lines(series, points), over="round")
        for title, series in ROUND_CURVES.items()
        if points and all(key in point for point in points for key, _ in series)
    ]


def _stage_row(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": name.replace("_", " "),
        "digest": manifest.digest,
        "seconds": f"{manifest.seconds:.1f}",
        "time": clock(manifest.seconds),
        "bytes": f"{manifest.num_bytes:,}",
        "counts": ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in manifest.counts.items()),
        "created_at": manifest.created_at,
    }
