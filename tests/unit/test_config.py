"""Recipes and overrides: what is accepted, and what an error says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.explain import explain, markdown_rows
from configs.load import ConfigError, load_run, parse_overrides, recipe_names, validate_run
from configs.schema.run import REWARD, VERIFIER, RunConfig


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert load_run(name).name


@pytest.mark.parametrize("name", recipe_names())
def test_a_run_that_is_written_out_is_read_as_it_was(name: str) -> None:
    """As ranks get it, and as `kdflow config` prints it."""
    common: tuple[dict[str, Any], ...] = (
        {},
        {"student.warmup_steps": 2, "student.warmup_fraction": None},
        {"student.warmup_fraction": 0.5},
        {"student.max_grad_norm": None, "student.checkpoint_minutes": 0.5},
        {"student.optimizer": {"type": "muon"}, "student.packing": False},
        {"student.lora": {"rank": 4, "targets": ["q_proj"]}},
        {"student.parameter_groups": [{"names": "*", "lr": 1e-3}]},
        {"student.num_ranks": 4, "student.replicas": 2},
        {"data.max_samples": 7, "storage.shard_rows": 64, "storage.chunk_rows": 32},
    )
    offpolicy: tuple[dict[str, Any], ...] = (
        {"eval.every_steps": 3, "eval.keep_best": "forward_kl", "eval.patience": 2},
        {"student.epochs": 2, "student.max_steps": None},
        {"delivery": "live", "teacher.forward_batches": 2},
    )
    on_policy = load_run(name).on_policy is not None
    for overrides in common + (() if on_policy else offpolicy):
        run = load_run(name, overrides)
        assert RunConfig.model_validate_json(run.model_dump_json()) == run
        assert validate_run(run.model_dump(mode="json")) == run


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["student.lr=1e-4", "a.b=[1, x]", "c=true", "d=null"]) == {
        "student.lr": 1e-4,
        "a.b": [1, "x"],
        "c": True,
        "d": None,
    }


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "No", "y", "n"])
def test_only_true_and_false_are_booleans(word: str) -> None:
    """As YAML 1.2 has it: a data source called `no` is a name."""
    assert parse_overrides([f"a={word}"]) == {"a": word}


def test_every_field_says_what_it_is_for() -> None:
    fields = explain()
    assert len({field.name for field in fields}) == len(fields) > 120
    assert [field.name for field in fields if not field.text.endswith((".", ")"))] == []
    names = {field.name: field for field in fields}
    assert names["student.lr"].default == "2e-05"
    assert names["student.model"].default is None
    assert "teacher.tensor_parallel (sglang)" in names
    assert "algorithm.teachers.NAME.weight" in names


def test_the_readmes_tables_say_what_the_fields_do() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [
        line for line in text.splitlines() if line.startswith("| `") and "." in line.split("|")[1]
    ]
    shown = [line.split("`")[1] for line in rows]
    assert len(shown) > 40
    assert rows == markdown_rows(shown)


def test_an_override_reaches_into_lists_and_sections(make_recipe: Callable[..., Path]) -> None:
    run = load_run(
        str(make_recipe()),
        {"data.sources.0.name": "mine", "loss.divergence": {"type": "reverse_kl"}},
    )
    assert run.data.source_names == ("mine",)
    assert run.loss.divergence.type == "reverse_kl"


NARROW = {"student.weights_dtype": "bfloat16", "student.compute_dtype": "bfloat16"}
RAY = {"type": "ray"}
BESIDE = RAY | {"placement": "colocated"}
SGLANG = {"type": "sglang"}
LATEST = {"student.start": "latest"}
ROUNDS = {
    "mode": "onpolicy",
    "student.max_steps": None,
    "on_policy": {"rounds": 1, "prompts_per_round": 8, "rollout": {"type": "transformers"}},
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.lrr": 1}, r"student\.lrr: unknown key 'lrr'; did you mean 'lr'\?"),
        ({"studnt.lr": 1}, r"studnt: unknown key 'studnt'; did you mean 'student'\?"),
        ({"data.sources.0.pth": "x"}, r"data\.sources\.0\.pth: .*did you mean 'path'"),
        ({"student.lr": "abc"}, r"student\.lr = 'abc': Input should be a valid number"),
        ({"student.lr": -1.0}, r"student\.lr = -1\.0: .*greater than 0"),
        ({"student.max_steps": 1.5}, r"student\.max_steps = 1\.5: "),
        ({"student.max_steps": "3"}, r"student\.max_steps = '3': "),
        ({"student.epochs": 2}, r"exactly one of `epochs` and `max_steps`"),
        ({"loss.divergence.type": "forwardkl"}, r"loss\.divergence: .*'forward_kl', 'reverse_kl'"),
        ({"storage.shard_rows": 100}, r"shard_rows=100 is not a multiple of chunk_rows=32"),
        ({"data.sources.0.path": "x.csv"}, r"cannot tell the format of '.*x\.csv'"),
        ({"data.sources.3.path": "x"}, r"'3' is not an index below 1"),
        ({"student.lr.x": 1}, r"'student\.lr': it holds 0\.003, not a section"),
        ({"name": "Bad Name"}, r"name = 'Bad Name'"),
        ({"student.weights_dtype": "bfloat16"}, r"needs compute_dtype=bfloat16"),
        (NARROW | {"student.optimizer": {"type": "muon"}}, r"needs optimizer\.type=adamw"),
        (NARROW | {"student.lora": {"rank": 2}}, r"needs lora=null"),
        ({"workers": RAY | {"address": "localhost:6379"}}, r"Ray gives a node its network address"),
        ({"workers": RAY | {"address": "ray://x:1"}}, r"workers\.address = 'ray://x:1'"),
        ({"workers": BESIDE}, r"placement=colocated is about rollout engines"),
        (
            ROUNDS | {"workers": BESIDE, "on_policy.rollout": SGLANG | {"num_engines": 2}},
            r"student\.num_ranks=1 has room for 1 of 1 GPUs each",
        ),
        (
            ROUNDS | {"workers": BESIDE, "on_policy.rollout": SGLANG | {"tensor_parallel": 2}},
            r"has room for 0 of 2 GPUs each",
        ),
        (
            ROUNDS | {"workers": BESIDE, "on_policy.rollout": SGLANG | {"weights": "broadcast"}},
            r"weights=broadcast goes between GPUs.*set it to tensor",
        ),
        (
            ROUNDS | {"workers": RAY, "on_policy.rollout": SGLANG | {"first_gpu": 1}},
            r"on_policy\.rollout\.first_gpu=1 counts the GPUs of one machine",
        ),
        (
            {
                "workers": RAY,
                "data.answers": {"by": "teacher", "engine": SGLANG | {"first_gpu": 2}},
            },
            r"data\.answers\.engine\.first_gpu=2 counts the GPUs of one machine",
        ),
        (
            LATEST | {"algorithm": {"type": "self_distillation"}},
            r"student\.start=latest is not for",
        ),
    ],
)
def test_bad_values_are_refused_by_path(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(str(make_recipe()), overrides)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_run("quickstrat")


def test_missing_recipe_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no recipe file 'no/such\.yaml'"):
        load_run("no/such.yaml")


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\ndata: [1,\n")
    with pytest.raises(ConfigError, match=r"(?s)broken\.yaml is not valid YAML.*line 3"):
        load_run(str(path))


def test_override_without_value_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"not of the form section\.field=value"):
        parse_overrides(["student.lr"])


def test_weights_on_some_sources_only(make_recipe: Callable[..., Path], data_file: Path) -> None:
    sources = [
        {"type": "files", "path": str(data_file), "name": "a", "weight": 1.0},
        {"type": "files", "path": str(data_file), "name": "b"},
    ]
    with pytest.raises(ConfigError, match="give it to all or to none"):
        load_run(str(make_recipe()), {"data.sources": sources})


def test_relative_paths_start_at_the_recipe(
    tmp_path: Path, make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe()
    run = load_run(str(recipe), {"data.sources.0.path": "here.jsonl"})
    assert run.data.sources[0].path == str(Path.cwd() / "here.jsonl")
    text = recipe.read_text()
    start = text.index("path: ") + len("path: ")
    recipe.write_text(text[:start] + "beside.jsonl" + text[text.index("\n", start) :])
    assert load_run(str(recipe)).data.sources[0].path == str(tmp_path / "beside.jsonl")


SECOND = {"type": "transformers", "model": {"type": "pretrained", "path": "./second"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"algorithm.type": "sft", "delivery": "live"},
            "no teacher states; leave `delivery` out",
        ),
        ({"algorithm.type": "self_distillation"}, "give teacher.model the same model"),
        ({"algorithm.type": "vanilla"}, "vanilla_kd"),
        (
            {"algorithm": {"type": "multi_teacher", "teachers": {"a": {"teacher": SECOND}}}},
            "at least 2 items",
        ),
        (
            {"algorithm": {"type": "multi_teacher", "teachers": {"teacher": {}, "b": {}}}},
            "all others have one",
        ),
        (
            {
                "algorithm": {
                    "type": "multi_teacher",
                    "teachers": {
                        "teacher": {"sources": ["sums.jsonl"]},
                        "b": {"teacher": SECOND, "sources": ["code"]},
                    },
                }
            },
            "each source needs its teacher",
        ),
        (
            {
                "student.vocabulary_parallel": True,
                "loss.divergence": {"type": "adaptive_kl"},
            },
            "needs whole output heads",
        ),
        ({"data.answers": {"by": "nobody"}}, "'teacher' or 'student'"),
        (
            {"student.shuffle_window_shards": 2, "loss.span_share": 1, "delivery": "auto"},
            "with loss.span_share: 1 training reads none",
        ),
        (
            {
                "algorithm": {
                    "type": "multi_teacher",
                    "teachers": {"teacher": {}, "student": {"teacher": SECOND}},
                }
            },
            "cannot be named 'student'",
        ),
        (
            {
                "student.shuffle_window_shards": 2,
                "algorithm": {
                    "type": "multi_teacher",
                    "teachers": {
                        "teacher": {"sources": ["sums.jsonl"]},
                        "b": {"teacher": SECOND, "sources": ["code"]},
                    },
                },
            },
            "goes by the shards of one teacher",
        ),
    ],
)
def test_what_an_algorithm_refuses(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(str(make_recipe()), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval.keep_best": "forward_kl"}, "goes by the held-out curve; set eval.every_steps"),
        ({"student.continues": "student/00"}, "continues=student/00 needs start=continue"),
        ({"student.continues": "my-run", "student.start": "continue"}, "student.continues"),
        ({"student.float32_residual": True}, "is beside compute_dtype=bfloat16"),
        (
            {"student.offload": True, "student.vocabulary_parallel": True},
            "offload=true needs vocabulary_parallel=false",
        ),
        (
            {"student.offload": True, "student.optimizer": {"type": "muon"}},
            "offload=true needs optimizer.type=adamw: Muon's",
        ),
        (
            {
                "student.float32_residual": True,
                "student.compute_dtype": "bfloat16",
                "student.weights_dtype": "bfloat16",
            },
            "float32_residual=true needs weights_dtype=float32",
        ),
    ],
)
def test_what_does_not_go_together(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(str(make_recipe()), overrides)


def test_paths_of_further_teachers_start_at_the_recipe(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe()
    tree = yaml.safe_load(recipe.read_text())
    teachers = {"teacher": {}, "b": {"teacher": SECOND}}
    tree["algorithm"] = {"type": "multi_teacher", "teachers": teachers}
    recipe.write_text(yaml.safe_dump(tree))
    run = load_run(str(recipe))
    assert run.algorithm.teachers["b"].teacher.model.path == str(tmp_path / "second")


ON_POLICY = {"rounds": 2, "prompts_per_round": 4}
WITHIN = {"within_classes": True, "divergence": {"type": "reverse_kl"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"on_policy": None}, "`mode: onpolicy` and the section `on_policy` go together"),
        (
            {"eval.keep_best": "forward_kl", "eval.patience": 2},
            "eval.patience is for `mode: offpolicy`",
        ),
        (
            {"eval.keep_best": "forward_kl", "on_policy.heldout_sequences": 0},
            "set on_policy.heldout_sequences",
        ),
        ({"mode": "offpolicy"}, "`mode: onpolicy` and the section `on_policy` go together"),
        ({"student.max_steps": 3}, r"student\.max_steps are for `mode: offpolicy`"),
        ({"delivery": "live"}, "is for `mode: offpolicy`; leave it out"),
        (
            {"data.answers": {"by": "student", "fraction": 0.5}},
            "answers.fraction is for `mode: off",
        ),
        ({"algorithm.type": "sft"}, "algorithm.type=sft is not for `mode: onpolicy`"),
        (
            {"teacher": {"type": "sglang_server", "url": "http://x"}},
            "mode: onpolicy runs the teacher inside the training ranks",
        ),
        ({"on_policy.prompt_weights": {"other": 1.0}}, r"prompt_weights names \['other'\]"),
        ({"on_policy.prompt_weights": {"sums.jsonl": 0.0}}, "`prompt_weights` are all 0"),
        (
            {"on_policy.reward": {"function": "a.py:f"}, "on_policy.top_p": 0.9},
            "needs temperature=1, top_p=1 and top_k=0",
        ),
        ({"on_policy.reward": {"function": "a"}}, r"on_policy\.reward\.function = "),
        (
            {"on_policy.fraction": {"type": "adaptive"}, "on_policy.heldout_sequences": 0},
            "set `heldout_sequences`",
        ),
        (
            {"on_policy.rollout": {"type": "sglang", "sleep": True}, "on_policy.max_staleness": 1},
            "leave one of them out",
        ),
        ({"student.sleep": True, "on_policy.max_staleness": 1}, "leave one of them out"),
        (
            {"on_policy.rollout": {"type": "transformers", "num_engines": 2}},
            r"num_engines=2: a round has only 1 of the batches of rollout\.prompts_per_batch",
        ),
        (
            {"on_policy.rollout": {"type": "sglang", "num_engines": 1000}},
            r"num_engines=1000: a round has only \d+ of the prompts that engines share",
        ),
        (
            {
                "loss.divergence": {"type": "sampled_reverse_kl"},
                "on_policy.fraction": {"type": "linear", "start": 0.5, "end": 1.0},
            },
            "sampled_reverse_kl learns from what the student has sampled",
        ),
        (
            {"loss": WITHIN, "on_policy.top_p": 0.9},
            "loss.within_classes learns from what the student has sampled",
        ),
        ({"loss": {"within_classes": True}}, "set divergence={type: reverse_kl}"),
        ({"loss": WITHIN | {"compared_by": "ranks"}}, "compared_by=folded"),
    ],
)
def test_on_policy_runs_that_do_not_fit(
    make_recipe: Callable[..., Path], overrides: dict[str, Any], message: str
) -> None:
    whole = {"mode": "onpolicy", "on_policy": dict(ON_POLICY)} | overrides
    if "url" in str(overrides):
        model = {"type": "pretrained", "path": "./teacher"}
        whole["teacher"] = overrides["teacher"] | {"model": model}
    with pytest.raises(ConfigError, match=message):
        load_run(str(make_recipe(max_steps=None)), whole)


def test_files_of_functions_start_at_the_recipe(make_recipe: Callable[..., Path]) -> None:
    overrides = {
        "mode": "onpolicy",
        "on_policy": ON_POLICY | {"reward": {"function": "r.py:f"}},
        "eval.verifier": "v.py:g",
    }
    run = load_run(str(make_recipe(max_steps=None)), overrides)
    here = Path.cwd()
    assert run.functions == {REWARD: f"{here / 'r.py'}:f", VERIFIER: f"{here / 'v.py'}:g"}
