"""Rows that are prompts alone, off-policy and on-policy: models write every answer, held-out ones
too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import DataError
from storage.artifact import ArtifactRef
from storage.tokens import TokenTable
from tests.conftest import run_inline
from tests.integration.test_on_policy import at_work, load, train

pytestmark = pytest.mark.ranks
ENGINE = {"type": "transformers", "dtype": "float32"}
ANSWERS = {"by": "teacher", "temperature": 0.0, "max_new_tokens": 8, "engine": ENGINE}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """48 questions; every third one has an answer already."""
    rows: list[dict[str, Any]] = []
    for number in range(48):
        row = {"messages": [{"role": "user", "content": f"{number} plus {number}?"}]}
        if number % 3 == 0:
            row["messages"].append({"role": "assistant", "content": f"It is {2 * number}."})
        rows.append(row | {"answer": str(2 * number)})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def supervised(ref: ArtifactRef, split: str) -> list[int]:
    return [
        int(n) for n in TokenTable(Path(ref.uri) / f"{split}.arrow").supervised_counts("student")
    ]


def source(path: Path) -> dict[str, Any]:
    return {"data.sources.0.path": str(path), "data.heldout_fraction": 0.3}


def test_without_a_writer_they_are_refused_with_the_remedy(
    make_recipe: Callable[..., Path], prompts: Path
) -> None:
    run = load_run(str(make_recipe()), source(prompts))
    with pytest.raises(DataError, match=r"32 of 48 samples .*no_answer: 32\).*set data\.answers"):
        run_inline(run, until="tokenize")


def test_off_policy_every_prompt_gets_an_answer(
    make_recipe: Callable[..., Path], prompts: Path
) -> None:
    overrides = source(prompts) | {"data.answers": ANSWERS | {"fraction": 0.25}}
    run: RunConfig = load_run(str(make_recipe(max_steps=2)), overrides)
    done = run_inline(run, until="evaluate", launched={"train", "generate", "extract"})
    tokens, answers = done["tokens"], done["answers"]
    assert 0 in supervised(tokens, "train")
    assert 0 in supervised(tokens, "heldout")
    for split in ("train", "heldout"):
        before, after = supervised(tokens, split), supervised(answers, split)
        assert min(after) >= 1
        if split == "heldout":  # the data's own are kept
            assert [a for a, b in zip(after, before, strict=True) if b] == [b for b in before if b]
    lacking = supervised(tokens, "train").count(0)
    assert lacking <= answers.counts["answered"] < len(supervised(tokens, "train"))
    assert answers.counts["heldout_answered"] == supervised(tokens, "heldout").count(0)
    scores = json.loads((Path(done["evaluation"].uri) / "evaluation.json").read_text())["models"]
    assert scores["teacher"]["all"]["forward_kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_on_policy_the_student_answers_and_the_teacher_the_held_out_ones(
    make_recipe: Callable[..., Path], prompts: Path, fraction: float
) -> None:
    more = source(prompts) | {"data.answers": ANSWERS}
    run = load(make_recipe, more, fraction={"type": "constant", "value": fraction})
    with at_work(run) as work:
        answers = work.spec.inputs["answers"]
        records = train(work, 2)
        student = work.export()
    # What the student answers itself in its rounds, nobody else has to.
    assert (0 in supervised(answers, "train")) == (fraction == 1)
    assert min(supervised(answers, "heldout")) >= 1
    assert [record.answers for record in records] == [round(16 * fraction)] * 2
    assert records[-1].heldout is not None
    assert student.counts["rounds"] == 2
