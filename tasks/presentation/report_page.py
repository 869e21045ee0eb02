"""The HTML report of a run: one self-contained file."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from configs.secrets import public_config
from kdflow_core.metrics import STEP_METRICS
from storage.artifact import Manifest
from storage.store import ArtifactStore
from tasks.execution.progress import clock
from tasks.presentation.tracking import HELDOUT_FILE, METRICS_FILE, read_metrics
from tasks.rounds.round_record import RoundRecord, read_rounds
from tasks.stages.identity import StageSpec

TEMPLATE = Path(__file__).parent / "report.html.jinja"
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
    path = store.local_copy(spec.inputs["evaluation"]) / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    tokens, kept = manifests["tokens"], manifests["student"].info.get("kept_step")
    sources = [*tokens.info["read"]]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=spec.run.name,
        figures=_step_curves(metrics, read_metrics(student / HELDOUT_FILE), kept),
        kept_step=kept,
        kept_by=spec.run.eval.keep_best,
        rounds=rounds,
        round_figures=_round_curves(rounds),
        models=[m for m in MODELS if m in evaluation["models"]],
        sources=["all", *sources],
        scores=evaluation["models"],
        samples=evaluation["samples"],
        dropped=tokens.info["dropped"],
        read=tokens.info["read"],
        first_dropped=tokens.info["first_dropped"],
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
    curves = [_curve(title, series, metrics) for title, series in figures.items()]
    return curves + ([_curve(HELDOUT_CURVE, HELDOUT_SERIES, heldout, kept)] if heldout else [])


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
        _curve(title, series, points, over="round")
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


def _curve(
    title: str,
    series: tuple[tuple[str, str], ...],
    metrics: list[dict[str, Any]],
    marked: int | None = None,
    *,
    over: str = "optimizer step",
) -> str:
    """An SVG of some metrics over the steps, one of which may be marked."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        steps = [record["step"] for record in metrics]
        for key, label in series:
            axes.plot(steps, [record[key] for record in metrics], label=label, linewidth=1.5)
        if marked is not None:
            axes.axvline(marked, color="#57606a", linestyle=":", label=f"kept: step {marked}")
        axes.set_title(title, loc="left")
        axes.set_xlabel(over)
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1 or marked is not None:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
