"""How the time of a run's parts grows with the number of its samples.

`python -m tests.benchmarks.growth`. Random models of a few layers, so that what remains is what
grows with the data: reading and tokenizing, planning, dividing into steps, evaluating a tenth of
it. An exponent of 1 is proportional growth.
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import numpy as np

from configs.load import validate_run
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tasks.execution.launch import launch_stage
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.benchmarks.subjects import work_folder
from tests.conftest import make_llama, make_tokenizer

Result = TypeVar("Result")
STAGES = ("tokenize", "extract", "evaluate")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and what came of it."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def make_run(folder: Path, samples: int) -> RunConfig:
    """A run of one step over so many samples, a tenth of them held out."""
    data = folder / f"data-{samples}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for i in range(samples):
            row = {"prompt": f"{i} plus {i % 97}?", "completion": f"It is {i + i % 97}."}
            file.write(json.dumps(row) + "\n")
    for name, hidden in (("teacher", 48), ("student", 32)):
        make_tokenizer(folder / name, texts=list(topics.values()))
        make_llama(folder / name, hidden=hidden, layers=2, rows=416, seed=hidden)
    models = {
        name: {"model": {"type": "pretrained", "path": str(folder / name)}}
        for name in ("teacher", "student")
    }
    return validate_run(
        {
            "name": "growth",
            "data": {
                "sources": [{"type": "files", "path": str(data)}],
                "max_length": 128,
                "heldout_fraction": 0.1,
            },
            "teacher": models["teacher"] | {"type": "transformers", "dtype": "float32"},
            "student": models["student"] | {"compute_dtype": "float32", "max_steps": 1},
            "eval": {"max_generations": 0},
            "storage": {
                "root": str(folder / f"store-{samples}"),
                "scratch": str(folder / f"scratch-{samples}"),
            },
            "tracking": {"tensorboard": False},
        }
    )


def measure(run: RunConfig) -> dict[str, float]:
    """Seconds of each part."""
    seconds: dict[str, float] = {}
    done: dict[str, ArtifactRef] = {}
    seconds["plan"], plan = timed(lambda: plan_stages(run))
    for stage, identity in plan.items():
        spec = stage_spec(identity, run, done)
        took, ref = timed(partial(launch_stage, spec, logging.getLogger("growth")))
        if stage in STAGES:
            seconds[stage] = took
        done = done | {identity.output: ref}
        if stage == "evaluate":
            break
    seconds["plan again"], _ = timed(lambda: plan_stages(run))
    table = TokenTable(Path(done["tokens"].uri) / "train.arrow")
    seconds["open and shuffle"], _ = timed(lambda: shuffled(table))
    return seconds


def shuffled(table: TokenTable) -> Any:
    """What every training does with all samples before its first step."""
    return table.lengths("student")[np.random.default_rng(0).permutation(len(table))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        measure(make_run(folder, 100))  # loads what ranks are forked from
        found = {n: measure(make_run(folder, n)) for n in sorted(options.samples)}
    sizes = np.log(list(found))
    packages = ("torch", "transformers", "datasets", "pyarrow")
    report = {
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "seconds": {str(n): own for n, own in found.items()},
        # Of the largest two: in small ones what a process start takes hides the rest.
        "exponents": {
            part: float(
                np.polyfit(sizes[-2:], np.log([o[part] for o in found.values()])[-2:], 1)[0]
            )
            for part in next(iter(found.values()))
        },
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
