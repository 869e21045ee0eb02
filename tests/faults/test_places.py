"""Recipes, stores and folders that cannot be used: one line at planning, with field and remedy."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from configs.errors import KdflowError
from configs.load import load_run
from storage.errors import StoreError
from storage.memo import Memo
from tasks.checks.device_check import check_devices
from tasks.checks.run_check import checked_plan
from tests.conftest import run_inline


def laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


RECIPES = {
    "duplicate key": (b"name: x\nname: y\n", "the key 'name' stands twice"),
    "duplicate key inside": (
        b"data: {max_length: 3, max_length: 4}\n",
        "'max_length' stands twice",
    ),
    "not UTF-8": (b"name: caf\xe9\n", "is not UTF-8"),
    "recursive": (b"a: &a [1, *a]\n", "stands inside what it repeats"),
    "recursive mapping": (b"a: &a {b: {c: *a}}\n", "stands inside what it repeats"),
    "billion laughs": (laughs().encode(), "stands for more than 100,000 values"),
    "deep": (b"a: " + b"[" * 50_000, "nested too deeply"),
    "large": (b"#" * 3_000_000, "has more than 1,048,576 bytes"),
    "endless number": (b"seed: " + b"9" * 10_000, "cannot be read"),
    "no such day": (b"seed: 2026-02-31", "cannot be read"),
    "object": (b"name: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    "infinite": (b"student: {lr: .inf}", "student.lr = inf: give a finite number"),
    "nan in a list": (b"student: {adam_betas: [0.9, .nan]}", "student.adam_betas.1 = nan"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_that_are_none(tmp_path: Path, kind: str) -> None:
    content, message = RECIPES[kind]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(KdflowError, match=message):
        load_run(str(path))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 2**70}, r"seed = 1180591620717411303424: Input should be less than 4294967296"),
        ({"student.max_steps": 10**30}, r"student\.max_steps = 1000"),
        ({"student.num_ranks": 100_000}, r"student\.num_ranks = 100000: .* 1024"),
        ({"student.num_ranks": 9, "student.global_batch_size": 8}, "fewer than num_ranks=9"),
        ({"student.adam_betas": [0.9, 1.0]}, r"student\.adam_betas\.1 = 1\.0"),
        ({"student.lr": float("inf")}, r"student\.lr = inf"),
        ({"loss.divergence": {"type": "forward_kl", "temperature": float("nan")}}, "nan"),
        ({"data.sources.0.columns": {"promt": "x"}}, "unknown key 'promt'"),
        ({"storage.scratch": "s3://bucket/x"}, "a folder of this machine"),
        ({"storage.root": "a" * 280}, "it is too long"),
        ({"data.sources.0.path": "a\0b"}, "control characters"),
        ({"name": "n" * 280}, "at most 100 characters"),
        ({"student..lr": 1}, "a part of the name is empty"),
    ],
)
def test_values_that_cannot_be(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(KdflowError, match=message):
        load_run(str(make_recipe()), overrides)


@pytest.mark.parametrize("name", ["a" * 280, "a" * 280 + ".yaml", "x/" * 3000 + "y.yaml"])
def test_recipe_names_that_no_file_has(name: str) -> None:
    with pytest.raises(KdflowError, match="no recipe"):
        load_run(name)


def test_a_seed_that_looks_like_a_day_trains(make_recipe: Callable[..., Path]) -> None:
    """Those above 2**24 once overflowed at the first step."""
    run = load_run(str(make_recipe(max_steps=1)), {"seed": 4_294_967_295})
    assert "student" in run_inline(run, until="train", launched=["train"])


def make_loop(folder: Path) -> Path:
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    return folder / "one" / "x"


PLACES = {
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file/x/y",
    "a loop": make_loop,
    "proc": lambda _: Path("/proc/kdflow"),
    "a device": lambda _: Path("/dev/null"),
}


@pytest.mark.parametrize("field", ["storage.root", "storage.scratch"])
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_used(
    make_recipe: Callable[..., Path], tmp_path: Path, field: str, place: str
) -> None:
    (tmp_path / "file").touch()
    run = load_run(str(make_recipe()), {field: str(PLACES[place](tmp_path))})
    with pytest.raises(StoreError, match=f"{field}=.*; set it to"):
        checked_plan(run, download=False)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("foo://bucket/x", "Protocol not known: foo"),
        ("http://127.0.0.1:9/x", "cannot be read"),
        ("s3://nobodys-bucket/x", "Unable to locate credentials"),
    ],
)
def test_remote_stores_that_are_not_there(
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    root: str,
    message: str,
) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    run = load_run(str(make_recipe()), {"storage.root": root})
    began = time.monotonic()
    with pytest.raises(StoreError, match=message):
        checked_plan(run, download=False)
    assert time.monotonic() - began < 40


def test_a_store_that_cannot_be_written_serves_what_it_has(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(str(make_recipe()))
    run_inline(run, until="report", launched=["train"])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("storage.store.ArtifactStore.write_whole", refuse)
    checked_plan(run, download=False)  # all is there
    other = load_run(str(make_recipe()), {"student.lr": 0.5})
    with pytest.raises(StoreError, match=r"storage\.root=.* cannot be written \(Permission denied"):
        checked_plan(other, download=False)


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"SQLite format 3\0" + b"x" * 5000, b"\xff" * 9]
)
def test_a_damaged_memo_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "memo.sqlite"
    path.write_bytes(content)
    memo = Memo(path)
    assert memo.get("a") is None
    memo.put("a", "b")
    assert Memo(path).get("a") == "b"


def test_a_memo_that_cannot_be_kept_serves_its_process(tmp_path: Path) -> None:
    (tmp_path / "memo.sqlite").mkdir()
    memo = Memo(tmp_path / "memo.sqlite")
    assert memo.get("a") is None
    memo.put("a", "b")
    assert memo.get("a") == "b"
    assert Memo(tmp_path / "memo.sqlite").get("a") is None


def test_a_kernel_without_a_backward_pass_here(make_recipe: Callable[..., Path]) -> None:
    run = load_run(str(make_recipe()), {"student.attention": "flex_attention"})
    with pytest.raises(KdflowError, match="no backward pass on a CPU"):
        checked_plan(run, download=False)


def test_more_ranks_than_the_machine_holds(make_recipe: Callable[..., Path]) -> None:
    overrides = {"student.num_ranks": 1000, "student.global_batch_size": 1000}
    run = load_run(str(make_recipe()), overrides)
    with pytest.raises(KdflowError, match=r"student\.num_ranks=1000: this machine has"):
        checked_plan(run, download=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.attention_backend": "foo"}, "attention_backend=foo is not SGLang's"),
        ({"teacher.attention_backend": "flashinfer"}, "needs the package flashinfer"),
        ({"teacher.quantization": "foo"}, "quantization=foo is not SGLang's"),
    ],
)
def test_names_that_sglang_does_not_know(
    make_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    run = load_run(str(make_recipe()), overrides | {"teacher.type": "sglang"})
    with pytest.raises(KdflowError, match=message):
        checked_plan(run, download=False)


def test_a_teachers_server_that_is_not_there(make_recipe: Callable[..., Path]) -> None:
    url = "http://127.0.0.1:9"
    run = load_run(str(make_recipe()), {"teacher.type": "sglang_server", "teacher.url": url})
    checked_plan(run, download=False)  # to look at a plan needs no server
    with pytest.raises(KdflowError, match=rf"teacher\.url={url} does not answer"):
        checked_plan(run, download=True)


def test_deterministic_states_are_not_for_gpus_that_train(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang would change the operators of the whole process, and with them the student's."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    live = {
        "delivery": "live",
        "teacher": {
            "type": "sglang",
            "model": {"type": "pretrained", "path": "/nowhere"},
            "deterministic": True,
        },
    }
    run = load_run(str(make_recipe()), live)
    with pytest.raises(KdflowError, match=r"teacher\.deterministic=true: on GPUs"):
        check_devices(run)
    check_devices(load_run(str(make_recipe()), live | {"delivery": "replay"}))


ON_POLICY = {
    "mode": "onpolicy",
    "loss.divergence": {"type": "reverse_kl"},
    "student.max_steps": None,
    "on_policy": {"rounds": 1, "prompts_per_round": 8, "rollout": {"type": "sglang"}},
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.num_ranks": 4}, r"student\.num_ranks=4: this machine has 2 GPUs"),
        ({"on_policy.rollout.first_gpu": 2}, "take the GPUs 2 to 2, and this machine has 0 to 1"),
        ({"on_policy.rollout.tensor_parallel": 4}, "take the GPUs 0 to 3, and this machine has 0"),
        ({"on_policy.rollout.weights": "broadcast"}, "share GPU 0, and NCCL takes a GPU once"),
        ({"on_policy.rollout.num_engines": 3}, r"num_engines=3: this machine has 2 GPUs"),
        (
            {"on_policy.rollout.num_engines": 2, "on_policy.rollout.first_gpu": 1},
            "2 of this engine take the GPUs 1 to 2",
        ),
        (
            {
                "on_policy.rollout": {
                    "type": "transformers",
                    "num_engines": 3,
                    "prompts_per_batch": 1,
                }
            },
            r"num_engines=3: this machine has 2 GPUs",
        ),
    ],
)
def test_gpus_that_are_not_there_or_are_taken(
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    recipe = str(make_recipe())
    with pytest.raises(KdflowError, match=message):
        check_devices(load_run(recipe, ON_POLICY | overrides))
    there = {"on_policy.rollout.first_gpu": 1, "on_policy.rollout.weights": "broadcast"}
    check_devices(load_run(recipe, ON_POLICY | there))


def test_what_engines_do_on_gpus_alone_is_refused_where_there_is_none(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the engine would say so, which starts when the teacher has run."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    recipe, model = str(make_recipe()), {"type": "pretrained", "path": "/nowhere"}
    experts = {"type": "sglang", "model": model, "num_ranks": 2, "tensor_parallel": 2}
    with pytest.raises(KdflowError, match=r"on_policy\.rollout\.sleep=true gives back"):
        check_devices(load_run(recipe, ON_POLICY | {"on_policy.rollout.sleep": True}))
    with pytest.raises(KdflowError, match=r"teacher\.expert_parallel=2: SGLang computes experts"):
        check_devices(load_run(recipe, {"teacher": experts | {"expert_parallel": 2}}))
    check_devices(load_run(recipe, {"teacher": experts}))


def test_engines_that_answer_side_by_side_have_a_gpu_each(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    answers = {"by": "teacher", "engine": {"type": "sglang"}}
    overrides = {"data.answers": answers, "student.num_ranks": 2}
    recipe = str(make_recipe())
    check_devices(load_run(recipe, overrides))
    with pytest.raises(KdflowError, match=r"2 of this engine take the GPUs 1 to 2"):
        check_devices(load_run(recipe, overrides | {"data.answers.engine.first_gpu": 1}))
