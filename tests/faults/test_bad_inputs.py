"""Bad input ends in one readable error, before anything expensive; what was finished stays."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from configs.load import ConfigError, load_run
from configs.schema.run import RunConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Algorithm, Ingredients
from kdflow_core.errors import AlignmentError, ModelError, WorkerError
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.sglang_runtime.versions import require_sglang
from storage.errors import RowsMismatchError
from storage.tokens import TokenTable, TokenWriter
from tasks.checks.engine_check import check_engines
from tasks.execution.launch import launch_stage
from tasks.jobs.stored import StoredStates, TeacherSequences
from tasks.stages.identity import StageSpec, open_store
from tasks.stages.planning import plan_stages
from tests.command import kdflow
from tests.conftest import VOCABULARY, make_llama, make_tokenizer, run_inline

SGLANG = {"type": "sglang"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.lrr=1", "student.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ("data.sources.0.path=/nowhere.jsonl", "no file at '/nowhere.jsonl'"),
        ("teacher.model.path=/nowhere", "there is no model folder '/nowhere'"),
    ],
)
def test_the_command_ends_with_one_line_and_code_1(
    make_recipe: Callable[..., Path], override: str, message: str
) -> None:
    said = kdflow("run", str(make_recipe()), override, code=1)
    assert message in said
    assert "Traceback" not in said
    assert said.startswith("error: ")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no sample is left of 0 read"),
        (['{"prompt": "a", "completion": "b"}', "{torn"], "line 2 is not JSON"),
        (['{"question": "a", "response": "b"}'], "fit none of the layouts"),
        ([json.dumps({"prompt": "long " * 200, "completion": "b"})] * 3, "too_long': 3"),
    ],
    ids=["empty", "malformed line", "wrong column", "over the context"],
)
def test_unusable_data(
    make_recipe: Callable[..., Path], tmp_path: Path, lines: list[str], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines))
    run = load_run(str(make_recipe()), {"data.sources.0.path": str(data)})
    spec = StageSpec(identity=plan_stages(run)["tokenize"], run=run, inputs={})
    with pytest.raises(WorkerError) as caught:
        launch_stage(spec, logging.getLogger("test"))
    assert message in str(caught.value)
    assert caught.value.expected
    assert "Traceback" not in str(caught.value)


def test_different_vocabularies(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "other", texts=["quite another text " * 20])
    make_llama(tmp_path / "other", hidden=32, layers=1, rows=416, seed=0)
    run = load_run(
        str(make_recipe()), {"student.model.path": str(tmp_path / "other"), "alignment": "exact"}
    )
    with pytest.raises(
        ModelError, match=r"different vocabularies: .* tokens, .* differ, for instance"
    ):
        run_inline(run, until="tokenize")


def test_an_architecture_without_known_head(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    run = load_run(str(make_recipe()))
    run_inline(run, until="tokenize")
    config = LlamaConfig.from_pretrained(teacher_folder)
    config.architectures = ["SomeNewForCausalLM"]
    folder = tmp_path / "new"
    make_tokenizer(folder, texts=["x"])
    make_llama(folder, hidden=16, layers=1, rows=416, seed=0)
    config.save_pretrained(folder)
    run = load_run(
        str(make_recipe()), {"teacher.model.path": str(folder), "student.model.path": str(folder)}
    )
    with pytest.raises(ModelError, match="head of SomeNewForCausalLM is not known"):
        run_inline(run, until="extract")


@pytest.mark.parametrize("change", ["shift", "swap", "truncate", "mask"])
def test_tokens_changed_behind_the_stores_back_are_refused(
    make_recipe: Callable[..., Path], change: str
) -> None:
    """A teacher state never meets a token it was not computed for."""
    run = load_run(str(make_recipe()))
    refs = run_inline(run, until="extract")
    path = Path(refs["tokens"].uri) / "train.arrow"
    table = TokenTable(path)
    rows = [copy.deepcopy(dict(table[i])) for i in range(len(table))]
    del table  # it maps the file that is written anew below
    first, second = rows[0], rows[1]
    if change == "shift":
        first["teacher_ids"] = first["student_ids"] = [*first["student_ids"][1:], 5]
    elif change == "swap":
        for name in ("student_ids", "teacher_ids", "student_supervised", "teacher_supervised"):
            first[name], second[name] = second[name], first[name]
    elif change == "truncate":
        for name in ("student_ids", "teacher_ids", "student_supervised", "teacher_supervised"):
            first[name] = first[name][:-1]
    else:
        first["teacher_supervised"] = first["student_supervised"] = [
            *first["student_supervised"][:-1].astype(bool),
            not first["student_supervised"][-1],
        ]
    with TokenWriter(path) as writer:
        for row in rows:
            writer.add(row)
    changed = TokenTable(path)
    with pytest.raises(RowsMismatchError, match="do not have the digest recorded"):
        list(TeacherSequences([changed], [(0, 0)]))
    if (
        change != "swap"
    ):  # a swapped sequence is still one that the teacher saw, with its own states
        stage = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=refs)
        from kdflow_core.student.step import collate
        from storage.states.reader import HiddenStateReader
        from tasks.jobs.stored import TokenExamples

        states = StoredStates(HiddenStateReader(store=open_store(run), ref=stage.inputs["states"]))
        with pytest.raises((RowsMismatchError, AlignmentError)):
            collate(
                [TokenExamples(changed)[0]],
                vanilla_kd(run),
                [states],
                weight=1.0,
                empty=False,
                device=torch.device("cpu"),
            )


def vanilla_kd(run: RunConfig) -> Algorithm:
    """The algorithm of a run."""
    folder = Path(run.teacher.model.path)
    ingredients = Ingredients(
        spec=LossSpec(divergence=ForwardKL(), kd_ratio=0.9, logits_bytes=10**6),
        model=load_causal_lm(folder, dtype=torch.float32, attention="sdpa"),
        heads={"teacher": load_head(folder, load_config(folder), VOCABULARY)},
        vocabulary_size=VOCABULARY,
    )
    return build_algorithm(run.algorithm, ingredients)


def test_a_teacher_changed_behind_the_stores_back_is_refused(
    make_recipe: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    """New weights under the old artifacts: the head is not the one of the states."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    run = load_run(str(make_recipe()), {"teacher.model.path": str(folder)})
    refs = run_inline(run, until="extract")
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=refs)
    make_llama(folder, hidden=48, layers=3, rows=448, seed=9)
    with pytest.raises(WorkerError, match="output head is not the one that its stored states"):
        launch_stage(spec, logging.getLogger("test"))


def test_a_wrong_checksum_of_a_gguf_file(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    model = {"type": "gguf", "path": str(tmp_path / "m.gguf"), "sha256": "0" * 64}
    run = load_run(str(make_recipe()), {"teacher.model": model})
    with pytest.raises(ModelError, match=r"m\.gguf has SHA-256 .*, the config pins 0000"):
        run_inline(run, until="prepare-teacher")


@pytest.mark.parametrize(
    ("layers", "message"), [([9], "layers 0 to 2"), ([0, 1, 2], "one must stay")]
)
def test_layers_that_cannot_be_dropped(
    make_recipe: Callable[..., Path], layers: list[int], message: str
) -> None:
    model = {"type": "layer_drop", "drop_layers": layers}
    recipe = make_recipe()
    run = load_run(str(recipe), {"student.model": model})
    with pytest.raises(ModelError, match=message):
        run_inline(run, until="prepare-student")


def test_diverging_training_is_stopped_with_a_remedy(make_recipe: Callable[..., Path]) -> None:
    run = load_run(str(make_recipe(lr=1e30)))
    refs = run_inline(run, until="extract")
    spec = StageSpec(identity=plan_stages(run)["train"], run=run, inputs=refs)
    with pytest.raises(WorkerError, match=r"not both finite, .*samples? .*; lower student\.lr"):
        launch_stage(spec, logging.getLogger("test"))


def test_an_untested_sglang_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.99")
    with pytest.raises(ModelError, match=r"SGLang 0\.5\.99 is installed; .* tested with 0\.5\.21"):
        require_sglang()


def test_a_missing_sglang_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ModelError, match=r"not installed: .*\.\[sglang\].* or set the type"):
        require_sglang()


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("teacher.type", {"teacher.type": "sglang"}),
        ("data.answers.engine.type", {"data.answers": {"by": "teacher", "engine": SGLANG}}),
        (
            "on_policy.rollout.type",
            {
                "mode": "onpolicy",
                "on_policy": {"rounds": 1, "prompts_per_round": 8, "rollout": SGLANG},
                "student.max_steps": None,
            },
        ),
    ],
)
def test_a_run_whose_engine_is_not_installed_does_not_begin(
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    overrides: dict[str, Any],
) -> None:
    run = load_run(str(make_recipe()), overrides)
    plan = plan_stages(run)
    check_engines(run, plan)
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.99")
    with pytest.raises(ConfigError, match=rf"^{field}=sglang: SGLang 0\.5\.99 is installed"):
        check_engines(run, plan)


def test_a_sequence_over_the_teachers_context_is_refused_before_the_teacher_starts(
    make_recipe: Callable[..., Path],
) -> None:
    run = load_run(str(make_recipe()), {"teacher.type": "sglang", "teacher.context_length": 20})
    with pytest.raises(ModelError, match=r"the teacher's context is 20; .*teacher\.context_length"):
        run_inline(run, until="extract")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.num_ranks": 3, "teacher.tensor_parallel": 2}, "num_ranks=3 is not a multiple"),
        (
            {"teacher.tensor_parallel": 2, "teacher.num_ranks": 2, "teacher.expert_parallel": 4},
            "expert_parallel=4 does not divide",
        ),
        (
            {"delivery": "live", "teacher.tensor_parallel": 2, "teacher.num_ranks": 2},
            "student.num_ranks=1 is not a multiple of the 2 ranks of one copy",
        ),
        ({"teacher.sleep": True}, "are for `delivery: live`"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(str(make_recipe()), {"teacher.type": "sglang"} | overrides)
