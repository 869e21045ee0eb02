"""Weights are what the folder says: one rule of which files they are, and nothing is made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema.models import PretrainedModel
from kdflow_core.errors import ModelError
from kdflow_core.models.checkpoints import INDEX, SINGLE, read_checkpoint
from kdflow_core.models.inspection import Use, check_model
from kdflow_core.models.loading import load_causal_lm
from storage.fingerprint import Fingerprints
from tasks.stages.slices import model_identity
from tests.conftest import make_llama, make_tokenizer

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def folder(tmp_path: Path, student_folder: Path) -> Path:
    """A copy of a model that a test may break."""
    return Path(shutil.copytree(student_folder, tmp_path / "model"))


def rewrite(folder: Path, change: Change) -> None:
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def split(folder: Path) -> dict[str, str]:
    """The folder's weights as two shards with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    (folder / SINGLE).unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without(name: str) -> Change:
    return lambda tensors: {n: t for n, t in tensors.items() if name not in n}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.self_attn.q_proj"), r"lacks 1 tensors \(model\.layers\.1\.self_attn\.q"),
        (without("layers.1."), "lacks 9 tensors"),
        (without("lm_head"), r"lacks 1 tensors \(lm_head\.weight\)"),
        (lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, r"_orig_mod\.lm_head"),
        (lambda t: {f"module.{n}": x for n, x in t.items()}, r"module\.lm_head"),
        (lambda t: t | {"model.extra.weight": torch.zeros(2)}, r"none .*\(model\.extra\.weight\)"),
        (
            lambda t: t | {"model.norm.weight": torch.zeros(7)},
            r"in another shape 1 tensors \(model\.norm\.weight\)",
        ),
        (
            lambda t: {n.replace("q_proj", "query"): x for n, x in t.items()},
            r"lacks 2 .*; it holds.* 2 tensors",
        ),
    ],
    ids=["a tensor", "a layer", "the head", "compiled", "ddp", "extra", "shape", "renamed"],
)
def test_a_checkpoint_that_is_not_the_model_is_refused(
    folder: Path, change: Change, message: str
) -> None:
    """By headers alone, as planning does, and by whoever loads it."""
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        check_model(folder, Use())
    with pytest.raises(ModelError, match=message):
        load_causal_lm(folder, dtype=torch.float32, attention="eager")


def test_a_whole_checkpoint_passes_in_one_file_and_in_shards(folder: Path) -> None:
    check_model(folder, Use(trained=True, in_sglang=True, attentions=("sdpa", "eager")))
    before = load_causal_lm(folder, dtype=torch.float32, attention="eager").state_dict()
    count = read_checkpoint(folder).num_parameters
    split(folder)
    check_model(folder, Use(trained=True, in_sglang=True))
    assert read_checkpoint(folder).num_parameters == count
    assert count == sum(t.numel() for t in before.values())
    after = load_causal_lm(folder, dtype=torch.float32, attention="eager").state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def second_checkpoint(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    split(folder)
    (folder / SINGLE).write_bytes(whole)


def gone_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def subfolder(folder: Path) -> None:
    weight_map = split(folder)
    (folder / "weights").mkdir()
    for file in set(weight_map.values()):
        (folder / file).rename(folder / "weights" / file)
    write_index(folder, {n: f"weights/{f}" for n, f in weight_map.items()})


def stale_shard(folder: Path) -> None:
    weight_map = split(folder)
    write_index(folder, {n: f for n, f in weight_map.items() if n != "lm_head.weight"})


def swapped_shards(folder: Path) -> None:
    weight_map = split(folder)
    first, second = sorted(set(weight_map.values()))
    write_index(folder, {n: second if f == first else first for n, f in weight_map.items()})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (second_checkpoint, "holds two checkpoints"),
        (gone_shard, "names model-00002-of-00002.safetensors, which is not there"),
        (subfolder, "names 'weights/model-00001-of-00002.safetensors'; shards are"),
        (stale_shard, "holds 'lm_head.weight', and .* has it nowhere"),
        (swapped_shards, "they belong to different checkpoints"),
        (pickled, r"pytorch_model\.bin, which is not safetensors and may run code"),
        (cut, "it is cut or damaged"),
        (lambda f: (f / SINGLE).write_bytes(b"\0" * 4), "is not a safetensors file"),
        (lambda f: (f / SINGLE).write_bytes(b"\xff" * 99), "is not a safetensors file"),
        (lambda f: (f / SINGLE).unlink(), "holds no safetensors weights"),
        (lambda f: (f / SINGLE).rename(f / "weights.safetensors"), "neither model.safetensors"),
        (lambda f: (f / INDEX).write_text("[]"), "is not an index of weights"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (
            lambda f: shutil.copy(f / SINGLE, f / "adapter_model.safetensors"),
            "holds adapter_model.safetensors beside model.safetensors",
        ),
    ],
)
def test_what_two_readers_would_read_differently_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    damage(folder)
    for reader in (
        lambda: read_checkpoint(folder),
        lambda: load_causal_lm(folder, dtype=torch.float32, attention="eager"),
        lambda: identity(folder, tmp_path),
    ):
        with pytest.raises(ModelError, match=message):
            reader()


def test_mistrals_second_form_of_the_same_weights_is_passed_over(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "consolidated.safetensors")
    assert read_checkpoint(folder).files == (SINGLE,)
    split(folder)
    assert INDEX in read_checkpoint(folder).files


def identity(folder: Path, scratch: Path) -> str:
    prints = Fingerprints(str(scratch / "scratch"))
    return model_identity(PretrainedModel(path=str(folder)), None, prints)


def test_the_identity_covers_what_loading_opens_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    before = identity(folder, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')  # ends are tokens' own
    (folder / "README.md").write_text("words")
    (folder / "training_args.bin").write_bytes(b"x")
    assert identity(folder, tmp_path) == before
    rewrite(folder, lambda t: {n: x + 1 for n, x in t.items()})
    assert identity(folder, tmp_path) != before


def test_a_folder_below_one_called_snapshots_is_hashed_like_any(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models/snapshots/best"
    shutil.copytree(folder, place)
    assert identity(place, tmp_path) == identity(folder, tmp_path)
    rewrite(place, lambda t: {n: x + 1 for n, x in t.items()})
    assert identity(place, tmp_path) != identity(folder, tmp_path)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_and_another_one_in_the_file(tmp_path: Path, *, same: bool) -> None:
    """A copy of the embedding is what many real checkpoints hold; another head would be lost."""
    make_tokenizer(tmp_path, texts=["some text"])
    make_llama(tmp_path, hidden=32, layers=1, rows=416, seed=0, tied=True)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": embedding.clone() + (0 if same else 1)})
    if same:
        check_model(tmp_path, Use(trained=True))
        load_causal_lm(tmp_path, dtype=torch.float32, attention="eager")
        return
    for reader in (
        lambda: check_model(tmp_path, Use()),
        lambda: load_causal_lm(tmp_path, dtype=torch.float32, attention="eager"),
    ):
        with pytest.raises(ModelError, match=r"ties the output head .* 'lm_head\.weight' of its"):
            reader()


def test_names_that_only_transformers_completes_are_refused_for_sglang(tmp_path: Path) -> None:
    """Saved from the bare model: transformers adds the prefix, SGLang keeps random layers."""
    make_tokenizer(tmp_path, texts=["some text"])
    make_llama(tmp_path, hidden=32, layers=1, rows=416, seed=0, tied=True)
    rewrite(tmp_path, lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    check_model(tmp_path, Use())
    with pytest.raises(ModelError, match=r"other names \('.*'\) than those that SGLang loads"):
        check_model(tmp_path, Use(in_sglang=True))
