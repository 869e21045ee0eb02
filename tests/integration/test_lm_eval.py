"""Benchmarks by the LM Evaluation Harness, of tasks of one's own: nothing is fetched."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import DataError
from storage.artifact import ArtifactRef
from tasks.presentation.results import benchmark_rows
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline

TASK = """
task: small_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
DOCUMENTS = 12


def documents() -> list[dict[str, object]]:
    """Sums, each with four answers of which one is right."""
    return [
        {
            "question": f"What is {i} plus {i}?\n",
            "choices": [str(2 * i + k) for k in (1, 0, 5, 3)],
            "label": 1,
        }
        for i in range(DOCUMENTS)
    ]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(own) + "\n" for own in documents()))
    (folder / "small_sums.yaml").write_text(TASK.format(data=data))
    return folder


def load(recipe: Path, tasks: Path, **more: object) -> RunConfig:
    lm_eval = {"tasks": ["small_sums"], "tasks_folder": str(tasks), "batch_size": 5}
    return load_run(str(recipe), {"eval.lm_eval": lm_eval} | more)


def share_of_right(folder: Path, limit: int) -> float:
    """How often the right answer is the most probable one, a sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for own in documents()[:limit]:
        scores = []
        for choice in own["choices"]:  # type: ignore[attr-defined]
            # The harness has white space at the end of a question go with the answer.
            question = str(own["question"]).rstrip()
            whole = tokenizer(str(own["question"]) + f" {choice}").input_ids
            begin = len(tokenizer(question).input_ids)
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(log_probs[i - 1, whole[i]].item() for i in range(begin, len(whole))))
        right += int(torch.tensor(scores).argmax()) == own["label"]
    return right / limit


def test_teacher_and_student_are_asked(
    make_recipe: Callable[..., Path],
    tasks: Path,
    teacher_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = load(make_recipe(max_steps=1), tasks)
    plan = list(plan_stages(run))
    assert plan.index("lm-eval-teacher") < plan.index("tokenize")
    done = run_inline(run, until="report", launched=["train"])
    assert "requests" not in capfd.readouterr().err
    store = open_store(run)
    (row,) = benchmark_rows(store, done)
    assert (row["task"], row["metric"], row["documents"]) == ("small_sums", "acc", DOCUMENTS)
    student = Path(done["student"].uri) / "model"
    for side, folder in (("teacher", teacher_folder), ("student", student)):
        assert row[side]["value"] == pytest.approx(share_of_right(folder, DOCUMENTS))
        assert row[side]["stderr"] is not None
    page = (Path(done["report"].uri) / "report.html").read_text()
    assert "<td>small_sums</td><td>acc</td>" in page
    assert f"{row['teacher']['value']:.4f}" in page


def digests(run: RunConfig) -> dict[str, str]:
    return {stage: own.digest for stage, own in plan_stages(run).items()}


def test_what_they_go_by(make_recipe: Callable[..., Path], tasks: Path) -> None:
    """Another student has the same teacher, other tasks are asked anew, and nothing else is."""
    recipe = make_recipe(max_steps=1)
    before = digests(load(recipe, tasks))
    for fields, changed in (
        ({"student.lr": 1.0}, {"train", "evaluate", "lm-eval", "report"}),
        ({"eval.lm_eval.batch_size": 2}, {"report"}),
        ({"eval.lm_eval.limit": 2}, {"lm-eval-teacher", "lm-eval", "report"}),
        ({"eval.max_generations": 2}, {"evaluate", "report"}),
    ):
        after = digests(load(recipe, tasks, **fields))
        assert {stage for stage, own in after.items() if own != before[stage]} == changed
    (tasks / "sums.jsonl").write_text(json.dumps(documents()[0]))
    after = digests(load(recipe, tasks))
    asked = {"lm-eval-teacher", "lm-eval", "report"}
    assert {stage for stage, own in after.items() if own != before[stage]} == asked


def test_what_cannot_be_asked_is_refused_first(
    make_recipe: Callable[..., Path], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(run: RunConfig) -> dict[str, ArtifactRef]:
        return run_inline(run, until="lm-eval-teacher")

    recipe = make_recipe(max_steps=1)
    with pytest.raises(DataError, match="lm_eval has no task 'small_sum'; did you mean small_sums"):
        first(load(recipe, tasks, **{"eval.lm_eval.tasks": ["small_sum"]}))
    (tasks / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"eval\.lm_eval: .*sums\.jsonl"):
        first(load(recipe, tasks))
    with pytest.raises(DataError, match=r"eval\.lm_eval\.tasks_folder: there is no YAML file"):
        plan_stages(load(recipe, tasks / "none"))

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(DataError, match=r"eval\.lm_eval needs the package lm_eval: pip install"):
        plan_stages(load(recipe, tasks))
