"""What benchmarks measure when they are given nothing: the quick start's models and data."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.load import load_run
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages

SUMS = Path(__file__).parents[2] / "configs/recipes/data/sums.jsonl"


def quickstart_model(side: str) -> Path:
    """The folder of the quick start's teacher or untrained student, made when it is not there."""
    run, done = load_run("quickstart"), dict[str, ArtifactRef]()
    for identity in plan_stages(run).values():
        if identity.kind == "model":
            ref = launch_stage(stage_spec(identity, run, done), logging.getLogger("benchmark"))
            done[identity.output] = ref
    return Path(done[f"{side}_model"].uri)


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, or a new one that is removed afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
