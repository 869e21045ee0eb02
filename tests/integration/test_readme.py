"""The README's commands, run as it shows them."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import kdflow
from tests.readme import ROOT, commands

BIN = ROOT / ".venv/bin"
SHORT = ["data.max_samples=30", "student.max_steps=3", "eval.max_generations=2"]


def run(words: list[str], cwd: Path, home: Path) -> str:
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "COLUMNS": "160",
        "PREFECT_HOME": str(home),
    }
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    assert commands("Two commands") == [["make", "quickstart"], ["make", "test"]]
    for words in commands("Two commands"):
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_commands_for_contributors_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"`?(make [a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"make install", "make test-fast", "make check", "make test", "make test-all"} <= targets
    for target in sorted(targets):
        subprocess.run([*target.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_ci_calls_the_test_command() -> None:
    assert re.search(r"^make .*\btest$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """Where the commands run; the models are prepared once."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(migrated, folder / "prefect")
    return folder


@pytest.mark.prefect
@pytest.mark.ranks
def test_commands_for_own_models_with_tiny_ones(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the quick start. What the doctor says is in test_doctor."""
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "store"), ".kdflow/store"))
    said = {}
    for words in commands("Your own models"):
        if words[1] != "doctor":
            mine = "tiny" if words[1] == "export" else str(recipe)
            own = [mine if word == "quickstart" else word for word in words[1:]]
            said[words[1]] = kdflow(*own)
    assert set(said) == {"recipes", "config", "plan", "estimate", "run", "store", "export"}
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert "quickstart" in said["recipes"].split()
    assert "max_grad_norm: 1.0" in said["config"]
    assert "be served from cache" not in said["plan"]
    assert "teacher, live" in said["estimate"]
    assert "student after" in said["run"]
    assert said["store"].count("tiny-") >= 5


@pytest.mark.slow  # the same with tiny models: above
@pytest.mark.prefect
@pytest.mark.ranks
def test_commands_for_own_models(folder: Path) -> None:
    """All but the estimate, which probes the real models; the one that trains the real quick start
    is cut to a few samples and steps.
    """
    shown = commands("Your own models")
    expected = {"doctor", "recipes", "config", "plan", "estimate", "run", "store", "export"}
    assert {words[1] for words in shown} == expected
    for words in shown:
        if words[1] == "estimate":
            continue
        extra = SHORT if words[1] == "run" else []
        output = run([*words, *extra], folder, folder / "prefect")
        if words[1] == "doctor":
            assert "sglang" in output.lower()
        elif words[1] == "recipes":
            assert "quickstart" in output.split()
        elif words[1] == "config":
            assert "max_grad_norm: 1.0" in output
        elif words[1] == "store":
            assert output.count("quickstart-") >= 7
        elif words[1] == "plan":
            assert "prepare-teacher" in output
        elif words[1] == "export":
            assert (folder / "small" / "model.safetensors").is_file()
        else:
            check_scores(output)


@pytest.mark.slow  # the same with tiny models: test_estimate
@pytest.mark.prefect
@pytest.mark.ranks
def test_the_estimate_of_the_quick_start(folder: Path) -> None:
    (words,) = (words for words in commands("Your own models") if words[1] == "estimate")
    assert "teacher, live" in run([*words, *SHORT], folder, folder / "prefect")


@pytest.mark.slow  # the same with tiny models, and SGLang: test_on_policy, test_deployment
@pytest.mark.prefect
@pytest.mark.ranks
def test_commands_on_policy(folder: Path) -> None:
    """The real models, SGLang as teacher and as rollout engine; cut to two short rounds."""
    short = [
        "data.max_samples=40",
        "student.global_batch_size=8",
        "on_policy.rounds=2",
        "on_policy.prompts_per_round=16",
        "on_policy.max_new_tokens=8",
        "on_policy.heldout_sequences=4",
        "eval.max_generations=2",
    ]
    train, show = commands("On-policy")
    output = run([*train, *short], folder, folder / "prefect")
    assert "student after" in output
    show[show.index("--round") + 1] = "2"
    output = run([*show, *short], folder, folder / "prefect")
    assert "16 of 16 answers of round 2" not in output  # ten are shown
    assert "10 of 16 answers of round 2" in output
    assert output.count("weights of round 1") == 10
    assert output.count("<|im_start|>assistant") == 10


def check_scores(output: str) -> None:
    """Forward KL falls already, and the teacher is the real one: a broken conversion would show
    in its perplexity.
    """
    rows = {
        cells[0]: [float(cell.rstrip("%")) for cell in cells[1:5]]
        for line in output.splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│┃]", line) if cell.strip()]) == 6
        and cells[0] in {"teacher", "student before", "student after"}
    }
    assert rows["student after"][0] < 0.8 * rows["student before"][0]
    assert rows["teacher"][0] < 0.001
    assert rows["teacher"][2] > 98
    assert 1 < rows["teacher"][3] < 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_from_a_clean_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    first = run(["make", "quickstart"], clone, tmp_path / "prefect")
    check_scores(first)
    again = run(["make", "quickstart"], clone, tmp_path / "prefect")
    assert re.findall("student after .*│", again) == re.findall("student after .*│", first)


@pytest.mark.slow  # the same with tiny models: tests/equivalence/test_cross_tokenizer
@pytest.mark.prefect
@pytest.mark.ranks
def test_commands_two_tokenizers(folder: Path) -> None:
    short = ["data.max_samples=60", "student.max_steps=3", "eval.max_generations=2"]
    train, show = commands("Two tokenizers")
    output = run([*train, *short], folder, folder / "prefect")
    assert "bits per byte" in output
    shown = run([*show, *short], folder, folder / "prefect")
    first, second = (line for line in shown.splitlines()[1:3])
    assert first.startswith("student │")
    assert second.startswith("teacher │")
