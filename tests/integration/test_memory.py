"""What a rank that trains holds, as it was planned and as it is measured."""

import logging
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from configs.load import load_run
from tasks.execution.launch import launch_stage
from tasks.forecast.memory import least_training
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.benchmarks.peaks import watched_peaks
from tests.conftest import make_llama, make_tokenizer, run_inline

WIDTH = 768
TOLERANCE = 0.15


@pytest.mark.ranks
@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": {"type": "muon"}}, {"num_ranks": 2}],
    ids=["adamw", "muon", "ranks"],
)
def test_training_holds_what_was_planned(
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    """Of a large student, over that of a small one: what each process has stays out of it. To the
    end, with the last checkpoint and the export. Activations, which come on top, are few.
    """
    # What is freed goes back at once: else the allocator keeps some of it, now more, now less.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    planned, measured = [], []
    for layers in (6, 16):
        folder = tmp_path / f"student-{layers}"
        make_tokenizer(folder, texts=list(topics.values()))
        make_llama(folder, hidden=WIDTH, layers=layers, rows=416, seed=0)
        model = {"type": "pretrained", "path": str(folder)}
        own = {"max_steps": 2, "checkpoint_every": 10, "activation_checkpointing": True}
        recipe = make_recipe(model=model, **own, **fields)
        run = load_run(
            str(recipe), {"student.micro_batch_tokens": 64, "student.save_dtype": "bfloat16"}
        )
        done = run_inline(run, until="extract")
        spec = stage_spec(plan_stages(run)["train"], run, done)
        with watched_peaks("StageHost", field="VmHWM") as peaks:
            launch_stage(spec, logging.getLogger("test"))
        measured.append(max(peaks.values()))
        planned.append(sum(least_training(run, folder, None, on_gpu=False).values()))
    (less, more), (expected_less, expected_more) = measured, planned
    assert more - less == pytest.approx(expected_more - expected_less, rel=TOLERANCE)
