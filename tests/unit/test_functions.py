"""Python functions that a run names: rewards, and what says which answers are right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from kdflow_core.errors import DataError
from kdflow_core.eval.greedy import accepted
from kdflow_core.functions import judged, load_function
from tasks.checks.run_check import checked_plan

FIELD = "eval.verifier"
FILE = """
import math
from operator import eq as same
if math.pi > 3:
    def sometimes(prompt, answer, label):
        return True
class Right:
    def __new__(cls, prompt, answer, label):
        return answer.strip() == label
right, length = Right, lambda prompt, answer, label: len(answer)
def none(prompt, answer, label):
    inner = 1
def broken(prompt, answer, label):
    return answer[label]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checks.py"
    path.write_text(FILE)
    return path


def test_a_function_gives_a_number_of_an_answer(file: Path) -> None:
    right = load_function(f"{file}:right", FIELD)
    assert judged(right, "2 plus 2?", " 4", "4", field=FIELD) == 1.0
    with pytest.raises(DataError, match="verifier gave None for the answer ' 4'; it must give a f"):
        judged(load_function(f"{file}:none", FIELD), "2 plus 2?", " 4", "4", field=FIELD)
    with pytest.raises(
        DataError,
        match=r"verifier failed for the answer ' 4' to the prompt '2 plus 2\?': TypeError: .*"
        r"\(.*checks\.py:14\)",
    ):
        judged(load_function(f"{file}:broken", FIELD), "2 plus 2?", " 4", "4", field=FIELD)
    with pytest.raises(DataError, match=r"eval\.verifier: .* has no function 'wrong'"):
        load_function(f"{file}:wrong", FIELD)
    with pytest.raises(DataError, match=r"eval\.verifier: there is no Python file"):
        load_function(f"{file.parent / 'other.py'}:right", FIELD)


def test_accepted_answers_are_shares_by_source(file: Path) -> None:
    right = load_function(f"{file}:right", FIELD)
    texts, labels = ["4", "5", "6"], ["4", "4", None]
    found = accepted(right, texts, ["?"] * 3, labels, ["a", "a", "b"], field=FIELD)
    assert found == {"all": pytest.approx(1 / 3), "a": 0.5, "b": 0.0}
    length = load_function(f"{file}:length", FIELD)
    with pytest.raises(DataError, match=r"gave 7\.0 for the answer 'seventy'; .* from 0 to 1"):
        accepted(length, ["seventy"], ["?"], [None], ["a"], field=FIELD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checks.py:righ", r"eval\.verifier: .*checks\.py has no function 'righ'; it has Right, "),
        ("checks.py:inner", r"has no function 'inner'"),
        ("other.py:right", r"eval\.verifier: there is no file .*other\.py"),
        ("broken.py:right", r"eval\.verifier: .*broken\.py is no Python file: .*line 1"),
        ("folder.py:right", r"eval\.verifier: there is no file .*folder\.py"),
    ],
)
def test_what_is_not_there_is_refused_before_a_run(
    file: Path, make_recipe: Callable[..., Path], name: str, message: str
) -> None:
    (file.parent / "broken.py").write_text("def right(prompt, answer, label:\n    return 1\n")
    (file.parent / "folder.py").mkdir()
    run = load_run(str(make_recipe()), {"eval.verifier": str(file.parent / name)})
    with pytest.raises(DataError, match=message):
        checked_plan(run, download=False)


def test_a_reward_too(file: Path, make_recipe: Callable[..., Path]) -> None:
    rounds: dict[str, Any] = {"rounds": 1, "prompts_per_round": 4}
    rounds["reward"] = {"function": f"{file}:wrong"}
    run = load_run(
        str(make_recipe(max_steps=None)),
        {"mode": "onpolicy", "on_policy": rounds | {"rollout": {"type": "transformers"}}},
    )
    with pytest.raises(DataError, match=r"on_policy\.reward\.function: .* no function 'wrong'"):
        checked_plan(run, download=False)


@pytest.mark.parametrize("name", ["right", "length", "none", "same", "sometimes", "Right"])
def test_what_is_there_passes_and_counts_for_the_evaluation_alone(
    file: Path, make_recipe: Callable[..., Path], name: str
) -> None:
    recipe = str(make_recipe())
    plain = checked_plan(load_run(recipe), download=False)
    plan = checked_plan(load_run(recipe, {"eval.verifier": f"{file}:{name}"}), download=False)
    changed = {stage for stage, own in plan.items() if own.digest != plain[stage].digest}
    assert changed == {"evaluate", "report"}
    file.write_text(FILE + "# another judgement\n")
    again = checked_plan(load_run(recipe, {"eval.verifier": f"{file}:{name}"}), download=False)
    assert again["evaluate"].digest != plan["evaluate"].digest
