"""Everything once on one device, in minutes: `make gpu-smoke`, or `python -m tests.gpu.smoke`.

Models are random and made on the spot, nothing is downloaded. It prints a table, and writes JSON
where `--json` says. A step that fails does not keep the others from running. Without a GPU, the
steps run that a CPU has, so that this script itself is known to work.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.gpu import parts, runs
from tests.gpu.place import Place

STEPS: Mapping[str, Callable[[Place], dict[str, Any]]] = {
    "machine": parts.machine,
    "lock": parts.lock,
    "loss": parts.loss,
    "teachers": parts.teachers,
    "many batches": parts.many_batches,
    "attention backends": parts.attention_backends,
    "replay and live": runs.replay_and_live,
    "kill and resume": runs.kill_and_resume,
    "rounds": runs.rounds,
    "refusals": runs.refusals,
    "error in mid-step": runs.error_in_mid_step,
}
NEEDS_GPU = frozenset({"attention backends", "refusals"})
NEEDS_TWO_GPUS = frozenset({"error in mid-step"})  # where there are GPUs at all


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one step: `passed`, `failed` or `skipped`."""

    step: str
    outcome: str
    seconds: float
    figures: dict[str, Any]


def attempt(name: str, place: Place) -> Outcome:
    """Run one step, unless this machine cannot."""
    gpus = torch.cuda.device_count()
    if (name in NEEDS_GPU and not gpus) or (name in NEEDS_TWO_GPUS and gpus == 1):
        return Outcome(step=name, outcome="skipped", seconds=0.0, figures={})
    begin = time.perf_counter()
    try:
        figures, outcome = STEPS[name](place), "passed"
    except Exception as error:  # noqa: BLE001 - the others are to run all the same
        sys.stderr.write(traceback.format_exc())
        figures, outcome = {type(error).__name__: str(error)[:500]}, "failed"
    seconds = round(time.perf_counter() - begin, 1)
    return Outcome(step=name, outcome=outcome, seconds=seconds, figures=figures)


def smoke(place: Place, only: Sequence[str] = ()) -> list[Outcome]:
    """All steps, or some, in order."""
    return [attempt(name, place) for name in STEPS if not only or name in only]


def show(outcomes: Sequence[Outcome]) -> None:
    """A table of them."""
    table = Table("step", "outcome", "seconds", "figures")
    for own in outcomes:
        figures = "; ".join(f"{name}: {value}" for name, value in own.figures.items())
        table.add_row(own.step, own.outcome, f"{own.seconds:.1f}", figures)
    Console().print(table)


def main() -> int:
    """The number of steps that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PREFECT_HOME", folder)
        outcomes = smoke(Place(Path(folder), torch.cuda.is_available()), options.only)
    show(outcomes)
    if options.json is not None:
        packages = ("torch", "transformers", "sglang")
        report = {
            "versions": {"python": platform.python_version()}
            | {package: metadata.version(package) for package in packages},
            "steps": [asdict(own) for own in outcomes],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return sum(own.outcome == "failed" for own in outcomes)


if __name__ == "__main__":
    sys.exit(main())
