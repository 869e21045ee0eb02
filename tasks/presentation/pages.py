"""Pages that stand alone, and curves in them as SVG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FOLDER = Path(__file__).parent
FEW = 10  # points that are shown as such
Points = Sequence[Mapping[str, Any]]


def curve(
    title: str,
    series: Sequence[tuple[str, Points, str]],
    marked: int | None = None,
    *,
    over: str = "optimizer step",
) -> str:
    """Lines, each with a label and of points that have a `step` and the value that it is named by:
    (label, points, name); a step may be marked. Points without the value are left out.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for label, points, name in series:
            known = [point for point in points if name in point]
            axes.plot(
                [point["step"] for point in known],
                [point[name] for point in known],
                label=label,
                linewidth=1.5,
                marker="." if len(known) <= FEW else "",  # of one there is no line
            )
        if marked is not None:
            axes.axvline(marked, color="#57606a", linestyle=":", label=f"kept: step {marked}")
        axes.set_title(title, loc="left")
        axes.set_xlabel(over)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1 or marked is not None:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def page_template(name: str) -> Template:
    """A page that is filled in; whatever goes into it is text, unless it says otherwise."""
    loader = FileSystemLoader(FOLDER)
    return Environment(autoescape=True, undefined=StrictUndefined, loader=loader).get_template(name)
