"""The net under the loading of weights, and what is exported with a student."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.load import load_run
from configs.schema.run import VERIFIER
from kdflow_core.contracts import HiddenRows, TokenSequence
from kdflow_core.errors import AlignmentError, DataError, ModelError
from kdflow_core.functions import load_function
from storage.tokens import TokenTable
from tasks.jobs import evaluation, whole_models
from tasks.jobs.evaluation import evaluate_student
from tasks.jobs.reference import Reference, lacking_room
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import TeacherSequences
from tasks.stages.identity import open_store, stage_spec
from tasks.stages.planning import plan_stages
from tests.conftest import CHATML, SilentReporter, make_llama, run_inline

pytestmark = pytest.mark.ranks
OTHER = CHATML.replace("<|im_end|>\n", "<|endoftext|>").replace("im_start|>", "im_start|> ")


def test_evaluation_refuses_a_teacher_that_is_not_the_one_that_was_stored(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    """The same head, so that its digest does not tell, and other layers below it."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    run = load_run(str(make_recipe(max_steps=1)), {"teacher.model.path": str(folder)})
    done = run_inline(run, until="train", launched={"train"})
    spec = stage_spec(plan_stages(run)["evaluate"], run, done)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    for parameter in model.model.layers[1].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    with pytest.raises(AlignmentError, match=r"far from those that teacher\.type=transformers has"):
        evaluate_student(StageRun(spec, SilentReporter()))


class Engine:
    """A teacher whose states are those of a model; what compares them asks for nothing else."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model

    def forward(self, sequences: list[TokenSequence]) -> list[HiddenRows]:
        rows = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.ids_T.astype("int64"))[None]
            with torch.no_grad():
                states = self._model(input_ids=ids).last_hidden_state[0]
            index = torch.from_numpy(sequence.target_positions_N - 1)
            rows.append(HiddenRows(buffer_RH=states.to(torch.bfloat16), index_N=index))
        return rows


def test_the_first_states_of_an_extraction_are_compared_with_transformers(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    run = load_run(str(make_recipe()), {"teacher.type": "sglang"})
    done = run_inline(run, until="tokenize")
    stage = StageRun(stage_spec(plan_stages(run)["extract"], run, done), SilentReporter())
    table = TokenTable(Path(done["tokens"].uri) / "train.arrow")
    sequences = list(TeacherSequences([table], [(0, i) for i in range(8)]))
    reference = Reference(stage, sequences)
    reference.compute()
    same: Any = Engine(teacher_folder)
    reference.compare(same)
    other_folder = Path(shutil.copytree(teacher_folder, tmp_path / "other"))
    make_llama(other_folder, hidden=48, layers=3, rows=448, seed=9)
    other: Any = Engine(other_folder)
    with pytest.raises(
        ModelError, match=r"the states that teacher\.type=sglang gives are far from"
    ):
        reference.compare(other)


def test_a_model_too_large_to_compare_is_told_and_not_loaded(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(str(make_recipe()), {"teacher.type": "sglang"})
    done = run_inline(run, until="tokenize")
    reporter = SilentReporter()
    stage = StageRun(stage_spec(plan_stages(run)["extract"], run, done), reporter)
    monkeypatch.setattr("tasks.jobs.reference.MEMORY_SHARE", 1e-12)
    Reference(stage, []).compute()
    assert "are not compared with transformers' own: it takes" in reporter.messages[0]


def test_a_student_is_exported_as_it_was_trained(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """With the template of the recipe, and with the end of its turns."""
    template = {"template": OTHER}
    run = load_run(
        str(make_recipe(max_steps=1)),
        {"student.chat_template": template, "teacher.chat_template": template},
    )
    done = run_inline(run, until="train", launched={"train"})
    folder = Path(done["student"].uri) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == OTHER
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.decode([i]) for i in ends} == {"<|endoftext|>", "<|im_end|>"}
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ends
    tokens = json.loads((Path(done["tokens"].uri) / "manifest.json").read_text())
    assert tokens["info"]["end_ids"]["student"] == ends
    assert AutoTokenizer.from_pretrained(student_folder).chat_template == CHATML


def test_a_verifier_that_fails_is_found_before_models_are_asked(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = tmp_path / "checks.py"
    checks.write_text("def fits(prompt, answer, label):\n    return {}[answer]\n")
    run = load_run(str(make_recipe(max_steps=1)), {"eval.verifier": f"{checks}:fits"})
    monkeypatch.setattr(evaluation, "load_model", pytest.fail)
    with pytest.raises(DataError, match=r"eval\.verifier failed .* KeyError: .*checks\.py:2\)"):
        run_inline(run, until="evaluate", launched=["train"])


def test_a_teacher_that_fits_no_device_is_scored_by_its_stored_states(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = tmp_path / "checks.py"
    checks.write_text(
        "def fits(prompt, answer, label):\n"
        "    return (len(prompt) + len(answer) + (label or '').count('1')) % 3 / 2\n"
    )
    run = load_run(str(make_recipe(max_steps=1)), {"eval.verifier": f"{checks}:fits"})
    loaded = run_inline(run, until="evaluate", launched=["train"])["evaluation"]
    whole = json.loads((Path(loaded.uri) / "evaluation.json").read_text())
    fits = load_function(f"{checks}:fits", VERIFIER)
    worth = [fits(s["prompt"], s["student after"], s["label"]) for s in whole["samples"]]
    assert whole["models"]["student after"]["all"]["accepted"] == pytest.approx(np.mean(worth))
    shutil.rmtree(loaded.uri)
    store = open_store(run)
    store.retract(loaded.kind, loaded.digest)

    def load(stage: StageRun, side: str, folder: Path) -> PreTrainedModel:
        assert side == "student"
        return load_model(stage, side, folder)

    load_model = evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", load)
    monkeypatch.setattr(whole_models, "SHARE", 1e-9)
    done = run_inline(run, until="report")
    own = json.loads((Path(done["evaluation"].uri) / "evaluation.json").read_text())
    for title in ("student before", "student after"):
        assert own["models"][title] == whole["models"][title]
    teacher, expected = own["models"]["teacher"]["all"], whole["models"]["teacher"]["all"]
    assert (teacher["forward_kl"], teacher["agreement"]) == (0.0, 1.0)
    assert teacher["perplexity"] == pytest.approx(expected["perplexity"], rel=0.01)
    assert "exact_match" in expected
    assert not {"exact_match", "accepted"} & teacher.keys()
    assert all("teacher" not in sample for sample in own["samples"])
    assert own["samples"]
    report = (Path(done["report"].uri) / "report.html").read_text()
    assert f">{100 * np.mean(worth):.1f} %<" in report
    assert f"{checks}:fits makes of them" in report


def test_a_student_that_fits_no_device_is_scored_layer_by_layer(
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the very scores; it answers no prompts, as each token would bring all layers anew."""
    run = load_run(str(make_recipe(max_steps=1)))
    loaded = run_inline(run, until="evaluate", launched=["train"])["evaluation"]
    whole = json.loads((Path(loaded.uri) / "evaluation.json").read_text())
    shutil.rmtree(loaded.uri)
    open_store(run).retract(loaded.kind, loaded.digest)
    monkeypatch.setattr(whole_models, "SHARE", 1e-9)
    monkeypatch.setattr(whole_models, "_rooms", lambda device: [(device, 0)])
    done = run_inline(run, until="report")
    own = json.loads((Path(done["evaluation"].uri) / "evaluation.json").read_text())
    for title in ("student before", "student after"):
        expected = whole["models"][title]["all"]
        assert "exact_match" in expected
        assert own["models"][title]["all"] == {
            name: value for name, value in expected.items() if name != "exact_match"
        }
    assert all(sample.keys() == {"source", "prompt", "label"} for sample in own["samples"])
    assert "answers" in (Path(done["report"].uri) / "report.html").read_text()


def test_why_a_teacher_is_not_loaded_whole(
    make_recipe: Callable[..., Path], teacher_folder: Path
) -> None:
    recipe = str(make_recipe())
    spread = {"teacher.type": "sglang", "teacher.tensor_parallel": 2, "teacher.num_ranks": 2}
    reasons = []
    for overrides in dict[str, object](), spread:
        run = load_run(recipe, overrides)
        spec = stage_spec(plan_stages(run)["evaluate"], run, {})
        stage = StageRun(spec, SilentReporter())
        reasons.append(whole_models.why_no_teacher(stage, teacher_folder))
    assert reasons == [None, "one copy of it is spread over 2 ranks"]
    reason = lacking_room(teacher_folder, torch.float32, torch.device("cpu"), 1e-9)
    assert reason is not None
    assert "of memory are to spare" in reason
