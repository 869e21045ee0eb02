"""Ranks of a stage that a scheduler starts, as torchrun, Slurm and Kubernetes do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from kdflow_core.student.checkpoint import completed_steps
from kdflow_core.workers.ports import free_port
from tasks.execution.scheduled_rank import context_of
from tasks.stages.planning import plan_stages
from tests.command import kdflow
from tests.conftest import run_inline
from tests.processes import PATIENCE_S
from tests.readme import ROOT, commands

TORCHRUN, KDFLOW = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "kdflow"))
pytestmark = pytest.mark.ranks
PLACE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def finish(recipe: Path) -> str:
    """What is said of a training that ends well, by the README's command for a recipe."""
    (command,) = (words for words in commands("Schedulers") if words[0] == "torchrun")
    words = [TORCHRUN, *(str(recipe) if word == "own-models" else word for word in command[1:])]
    words[words.index("kdflow")] = KDFLOW
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "KDFLOW-EVENT" not in said
    return said


def test_a_student_trained_by_them_is_that_of_a_run(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the README's command; then there is nothing left to do."""
    recipe = make_recipe(num_ranks=2)
    run = load_run(str(recipe))
    run_inline(run, until="extract")
    said = finish(recipe)
    assert said.count("training from step 0 of 6") == 1
    assert "6 of 6 steps" in said

    with monkeypatch.context() as patch:
        for name, value in PLACE.items():  # one of two ranks, of which the other is not there
            patch.setenv(name, value)
        kdflow("worker", str(recipe), "train")

    elsewhere = {f"storage.{name}": str(tmp_path / f"run-{name}") for name in ("root", "scratch")}
    expected = run_inline(load_run(str(recipe), elsewhere), until="train", launched=["train"])
    digest = plan_stages(run)["train"].digest
    trained = tmp_path / "store/artifacts/student" / digest / "model/model.safetensors"
    model = Path(expected["student"].uri) / "model/model.safetensors"
    assert trained.read_bytes() == model.read_bytes()


@pytest.mark.slow  # a SIGTERM to a run of ours: test_interrupt
def test_ranks_that_are_told_to_end_save_first(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """By a SIGTERM to each, as by a scheduler that wants its machines."""
    recipe = make_recipe(num_ranks=2, max_steps=80, checkpoint_every=10**6)
    run = load_run(str(recipe))
    run_inline(run, until="extract")
    place = PLACE | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "flows", "worker", str(recipe), "train"],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if " of 80 steps" in line:
            break
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], "\n".join(outputs)
    digest = plan_stages(run)["train"].digest
    (step,) = completed_steps(tmp_path / "scratch/student" / digest / "checkpoints")
    assert 0 < step < 80
    assert f"training from step {step} of 80 (resumed" in finish(recipe)


def test_a_process_alone_is_the_one_rank_of_a_stage(make_recipe: Callable[..., Path]) -> None:
    recipe = str(make_recipe(max_steps=2))
    for stage in ("tokenize", "extract"):
        kdflow("worker", recipe, stage)
    assert kdflow("plan", recipe).count("be served from cache") == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is not a whole number"),
        ({"RANK": "2"}, "RANK=2 is none of WORLD_SIZE=2 ranks"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ],
)
def test_a_place_that_is_none(changed: dict[str, str | None], said: str) -> None:
    place = {n: v for n, v in (PLACE | changed).items() if v is not None}
    with pytest.raises(ConfigError, match=said):
        context_of(place)


def test_what_a_rank_is_told_before_it_begins(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(make_recipe())
    assert "stage tokenize is not in" in kdflow("worker", recipe, "train", code=1)
    assert "no stage 'trian'; it has tokenize" in kdflow("worker", recipe, "trian", code=1)
    auto = kdflow("worker", recipe, "train", "delivery=auto", code=1)
    assert "set delivery=replay or live" in auto
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    said = kdflow("worker", recipe, "tokenize", code=1)
    assert "WORLD_SIZE=2, but stage tokenize of this run has 1 ranks" in said
    assert time.monotonic() - begun < 60  # it does not wait for the others
