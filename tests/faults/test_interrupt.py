"""Ctrl-C in a real terminal: seconds to the prompt, one line, no process left, and on it goes."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kdflow_core.student.checkpoint import completed_steps
from tests.faults.test_kill_on_policy import write_recipe
from tests.readme import ROOT
from tests.terminal import CTRL_C, Terminal, fresh_home, seconds_to_the_prompt

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]
AT_MOST_S = 5.0
STAGES = {
    "tokenize": "stage tokenize, artifact",
    "extract": "stage extract, artifact",
    "train": r"[2-9]\d* of [\d,]+ steps",
    "evaluate": "stage evaluate, artifact",
}


@pytest.fixture
def env(migrated: Path, tmp_path: Path) -> dict[str, str]:
    """That of somebody with a Prefect home and no server."""
    shutil.copytree(migrated, tmp_path / "prefect")
    return fresh_home(tmp_path)


def assert_ended_well(terminal: Terminal, command: str) -> None:
    last = terminal.output.strip().splitlines()[-1]
    assert last == f"interrupted; what is done is kept, and this goes on from there: {command}"
    assert "Traceback" not in terminal.output
    assert terminal.left_behind() == []


def states_of(home: Path) -> list[str]:
    """Of all flow runs that this Prefect knows."""
    with sqlite3.connect(home / "prefect.db") as database:
        return [name for (name,) in database.execute("SELECT state_name FROM flow_run")]


def test_a_training_that_is_ended_in_every_way(
    make_recipe: Callable[..., Path], tmp_path: Path, env: dict[str, str]
) -> None:
    """One run, ended by Ctrl-C, then by a SIGTERM to all its processes, as batch systems send it
    before they kill, and by SIGKILL; each time it goes on from where it was.
    """
    recipe = make_recipe(max_steps=3000, checkpoint_every=10**6, num_ranks=2)
    command = f"kdflow run {recipe}"
    terminal = Terminal("run", str(recipe), env=env)
    terminal.wait_for(STAGES["train"])
    assert seconds_to_the_prompt(terminal) < AT_MOST_S
    assert_ended_well(terminal, command)

    terminal = Terminal("run", str(recipe), env=env)
    terminal.wait_for(STAGES["train"])
    assert "stage tokenize" not in terminal.output  # what was done is not done again
    terminal.press(b"")
    run = psutil.Process(terminal.pid)
    for process in (*run.children(recursive=True), run):
        process.terminate()
    assert terminal.wait(5 * AT_MOST_S) == 75  # an exit code of its own
    last = terminal.output.strip().splitlines()[-1]
    assert last == f"terminated; what is done is kept, and this goes on from there: {command}"
    assert terminal.left_behind() == []
    assert states_of(tmp_path / "prefect") == ["Crashed", "Crashed"]
    checkpoints = next((tmp_path / "scratch/student").glob("*/checkpoints"))
    (step,) = completed_steps(checkpoints)
    assert step > 1

    terminal = in_training(recipe, env)
    assert f"training from step {step} of 3000 (resumed" in terminal.output
    psutil.Process(terminal.pid).kill()
    assert terminal.wait() == -9
    assert terminal.left_behind() == []
    assert sorted(states_of(tmp_path / "prefect")) == ["Crashed", "Crashed", "Running"]
    terminal = Terminal("run", str(recipe), "student.max_steps=2", env=env)
    assert terminal.wait() == 0, terminal.output
    assert "1 runs whose process is gone are now shown as crashed" in terminal.output
    assert sorted(states_of(tmp_path / "prefect")) == ["Completed", *["Crashed"] * 3]


@pytest.mark.slow  # the same way out as of training, above
def test_ctrl_c_at_every_stage(
    make_recipe: Callable[..., Path], tmp_path: Path, env: dict[str, str]
) -> None:
    recipe = make_recipe(max_steps=200, checkpoint_every=20)
    for stage, place in STAGES.items():
        terminal = Terminal("run", str(recipe), env=env)
        terminal.wait_for(place)
        assert seconds_to_the_prompt(terminal) < AT_MOST_S, stage
        assert_ended_well(terminal, f"kdflow run {recipe}")
    terminal = Terminal("run", str(recipe), env=env)
    assert terminal.wait() == 0, terminal.output
    assert "200 of 200 steps" not in terminal.output  # what was done is not done again
    states = states_of(tmp_path / "prefect")
    assert sorted(states) == ["Completed", *["Crashed"] * len(STAGES)]


@pytest.mark.slow  # Ctrl-C: at every stage above; rounds that end early: test_kill_on_policy
def test_ctrl_c_in_a_round(
    make_recipe: Callable[..., Path], tmp_path: Path, env: dict[str, str]
) -> None:
    recipe = write_recipe(make_recipe, tmp_path / "run", {"type": "transformers"})
    terminal = Terminal("run", str(recipe), env=env)
    terminal.wait_for("round 2 of")
    assert seconds_to_the_prompt(terminal) < AT_MOST_S
    assert_ended_well(terminal, f"kdflow run {recipe}")
    terminal = Terminal("run", str(recipe), env=env)
    assert terminal.wait() == 0, terminal.output
    assert "round 1 of 6 | kd" in terminal.output
    assert states_of(tmp_path / "prefect").count("Running") == 0


def in_training(recipe: Path, env: dict[str, str]) -> Terminal:
    """A run that trains, its processes noted."""
    terminal = Terminal("run", str(recipe), env=env)
    terminal.wait_for("training from step")
    terminal.press(b"")
    return terminal


def test_the_end_of_the_temporary_server_ends_the_run(env: dict[str, str]) -> None:
    """Nothing ends it alone but a fault in it, which is planted here."""
    program = """
import asyncio, time, uvicorn
from flows.foreground import foreground
from flows.prefect_api import prefect_api

async def fail_soon(self):
    await asyncio.sleep(1.0)
    raise RuntimeError("planted")

uvicorn.Server.main_loop = fail_soon
with foreground(["kdflow", "run", "mine"]) as process, prefect_api(process.died):
    time.sleep(60)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last == (
        "Prefect's temporary server has ended (RuntimeError: planted); what is done is kept, and "
        "this goes on from there: kdflow run mine"
    )


def test_an_interrupt_while_planning(
    make_recipe: Callable[..., Path], tmp_path: Path, env: dict[str, str]
) -> None:
    recipe = make_recipe()
    terminal = Terminal("run", str(recipe), "seed=7", env=env)
    terminal.wait_for_library("libtorch")
    terminal.press(CTRL_C)
    assert terminal.wait(4 * AT_MOST_S) == 130  # a library that is being loaded comes first
    assert f"this goes on from there: kdflow run {recipe} seed=7" in terminal.output


def test_an_address_that_nobody_answers(
    make_recipe: Callable[..., Path], tmp_path: Path, env: dict[str, str]
) -> None:
    env = env | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    terminal = Terminal("run", str(make_recipe()), env=env)
    assert terminal.wait(60) == 1
    (line,) = terminal.output.strip().splitlines()
    assert line.startswith("error: PREFECT_API_URL=http://127.0.0.1:9/api does not answer")
