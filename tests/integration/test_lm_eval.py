"""Benchmarks by the LM Evaluation Harness, of tasks of one's own: nothing is fetched."""

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.contracts import OutputHead, TokenSequence
from kdflow_core.errors import DataError
from kdflow_core.eval.engine_lm import EngineModel
from kdflow_core.rollout.base import Prompt, Sampling
from storage.artifact import ArtifactRef
from tasks.presentation.results import BENCHMARKS_FILE, benchmark_rows
from tasks.stages.identity import open_store
from tasks.stages.planning import plan_stages
from tests.conftest import make_llama, run_inline

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
WRITTEN = """
task: written_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["7", "?"], max_gen_toks: 12}}
metric_list: [{{metric: bleu, aggregation: bleu, higher_is_better: true}}]
metadata: {{version: 1}}
"""
READ = """
task: read_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1}}
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
    for name, text in (("small_sums", TASK), ("written_sums", WRITTEN), ("read_sums", READ)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
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


SGLANG = {"type": "sglang", "dtype": "float32", "tensor_parallel": 2, "num_ranks": 2}


@pytest.mark.ranks
def test_a_teacher_over_two_ranks_is_asked_by_its_own_engine(
    make_recipe: Callable[..., Path], tasks: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """All kinds of requests: as transformers answers them, which has the whole of it. (Of a head
    without rows that are no tokens: they take part there.)
    """
    recipe, folder = make_recipe(max_steps=1), tmp_path / "even"
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    make_llama(folder, hidden=48, layers=3, rows=len(tokenizer), seed=1)
    tokenizer.save_pretrained(folder)
    names = {"eval.lm_eval.tasks": ["small_sums", "written_sums", "read_sums"]}
    model = {"type": "pretrained", "path": str(folder)}
    found = []
    for teacher in ({"type": "transformers", "dtype": "float32"}, SGLANG):
        more = {"teacher": teacher | {"model": model}}
        run = load(recipe, tasks, **names, **more)
        launched = ["lm-eval-teacher"] if teacher is SGLANG else []
        done = run_inline(run, until="lm-eval-teacher", launched=launched)
        text = (Path(done["teacher_benchmarks"].uri) / BENCHMARKS_FILE).read_text()
        found.append({(own["task"], own["metric"]): own for own in json.loads(text)})
    whole, spread = found
    assert whole.keys() == spread.keys() >= {("read_sums", "word_perplexity")}
    for key, own in whole.items():
        # Its states are rounded to bfloat16.
        assert spread[key]["value"] == pytest.approx(own["value"], rel=3e-3)
        assert spread[key]["documents"] == DOCUMENTS


class Here:
    """A model in this process, asked as engines are."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self._model = model
        self.max_length = max_length
        self.head = OutputHead(weight_VH=model.get_output_embeddings().weight.detach())

    def states(self, sequences: Sequence[TokenSequence]) -> Iterator[torch.Tensor]:
        for sequence in sequences:
            assert len(sequence.ids_T) <= self.max_length
            with torch.no_grad():
                ids_BT = torch.from_numpy(sequence.ids_T)[None]
                hidden_TH = self._model.model(ids_BT).last_hidden_state[0]
            yield hidden_TH[sequence.target_positions_N - 1]

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
        assert sampling.temperature == 0
        found = []
        for prompt in prompts:
            out = self._model.generate(
                torch.from_numpy(prompt.ids_T)[None],
                max_new_tokens=prompt.max_new_tokens,
                do_sample=False,
            )
            found.append(out[0, len(prompt.ids_T) :].numpy())
        return found


def test_requests_are_understood_as_the_harness_itself_understands_them(
    teacher_folder: Path,
) -> None:
    """Its own model, of the same weights, gives the same numbers and texts."""
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
    chat = SimpleNamespace(tokenizer=tokenizer, end_ids=(tokenizer.eos_token_id,))
    progress: list[int] = []
    reporter = SimpleNamespace(progress=lambda **event: progress.append(event["done"]))

    def asked(max_length: int) -> EngineModel:
        return EngineModel(Here(model, max_length), chat, reporter=reporter, title="")  # type: ignore[arg-type]

    ours = asked(65)  # with the token that is scored and not read
    long = "one and one is two, and so on. " * 20
    pairs = [
        ("What is 1 plus 1?", " 2"),
        ("What is 1 plus 1?", " 3"),
        ("What is 1 plus 1?\n", "several tokens at once"),
        ("", "a text with nothing before it"),
        ("x ", "y"),
        (long, " two"),
        (tokenizer.decode(tokenizer.eos_token_id) + "after the end", " comes"),
    ]

    def instances(kind: str, arguments: Sequence[tuple[object, ...]]) -> list[Instance]:
        return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]

    requests = instances("loglikelihood", pairs)
    for own, other in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert own[0] == pytest.approx(other[0], rel=1e-4)
        assert own[1] == other[1]
    texts = instances("loglikelihood_rolling", [(long,), ("short",)])
    rolled = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, rel=1e-4)
    ours = asked(64)
    options = {"until": ["a", "3"], "max_gen_toks": 9}
    writing = [(text, dict(options)) for text in ("What is 2 plus 2?", long)]
    writing.append(("another", {"until": [], "max_gen_toks": 3}))
    requests = instances("generate_until", writing)
    assert ours.generate_until(requests) == theirs.generate_until(requests)
    assert progress[-1] == len(writing)
    assert max(progress) > len(pairs)
    with pytest.raises(DataError, match="answers of 64 tokens, and the model takes 64"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": 64})]))


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
