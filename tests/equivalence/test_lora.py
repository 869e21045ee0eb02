"""Training low-rank adapters: they learn, the model's own weights do not, and what is exported has
them merged.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.load import load_run
from kdflow_core.errors import ModelError, WorkerError
from kdflow_core.student.lora import add_adapters, served_weights
from tasks.presentation.tracking import read_metrics
from tests.conftest import run_inline

pytestmark = pytest.mark.ranks
RANK = 3


def test_what_training_changes(make_recipe: Callable[..., Path], student_folder: Path) -> None:
    """The linear layers of the decoder, by matrices of the adapters' rank; and the loss falls as it
    does with one rank.
    """
    exported, losses = [], []
    for num_ranks in (1, 2):
        overrides = {"student.lora": {"rank": RANK, "alpha": 6}, "student.lr": 0.02}
        run = load_run(str(make_recipe(num_ranks=num_ranks)), overrides)
        folder = Path(run.storage.root).parent / str(num_ranks)
        where = {"storage.root": f"{folder}/store", "storage.scratch": f"{folder}/scratch"}
        run = load_run(str(make_recipe(num_ranks=num_ranks)), overrides | where)
        ref = run_inline(run, until="train", launched={"train"})["student"]
        exported.append(load_file(Path(ref.uri) / "model/model.safetensors"))
        losses.append([r["loss"] for r in read_metrics(Path(ref.uri) / "metrics.jsonl")])
    before = load_file(student_folder / "model.safetensors")
    assert exported[0].keys() == before.keys()
    for name, weight in exported[0].items():
        changed = weight - before[name]
        if "_proj." in name:
            singular = torch.linalg.svdvals(changed)
            assert singular[RANK - 1] > 1e-5
            assert singular[RANK] < 1e-5 * singular[0]
        else:
            assert not changed.any(), name
        torch.testing.assert_close(weight, exported[1][name], rtol=1e-3, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_merging_is_pefts(student_folder: Path) -> None:
    from configs.schema.student import LoraConfig as Ours

    def filled(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)

    ours = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    config = Ours(rank=2, alpha=5, targets=("q_proj", "down_proj"))
    add_adapters(ours, config)
    filled(ours)
    state = ours.state_dict()
    served = served_weights(state, config.scale)
    merged = {name: weight.value(state.__getitem__) for name, weight in served.items()}
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    )
    filled(theirs)
    expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)


def test_the_adapter_itself_is_exported(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """PEFT loads it over the student as it was, and gets the student that is exported merged."""
    overrides = {"student.lora": {"rank": RANK, "targets": ["q_proj", "down_proj"]}}
    run = load_run(str(make_recipe(lr=0.02)), overrides)
    ref = run_inline(run, until="train", launched={"train"})["student"]
    before = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(before, str(Path(ref.uri) / "adapter"))
    merged = adapted.merge_and_unload().state_dict()
    exported = load_file(Path(ref.uri) / "model/model.safetensors")
    assert merged.keys() == exported.keys()
    for name, weight in exported.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)


def test_targets_that_are_not_there(make_recipe: Callable[..., Path]) -> None:
    overrides = {"student.lora": {"targets": ["no_proj"]}}
    run = load_run(str(make_recipe()), overrides)
    with pytest.raises((ModelError, WorkerError), match=r"student\.lora\.targets=.*no_proj"):
        run_inline(run, until="train", launched={"train"})


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "frozen",
    [
        {"student.lora": {"rank": RANK}},
        {"student.parameter_groups": [{"names": "*.layers.0.*", "frozen": True}]},
        {"student.parameter_groups": [{"names": "*embed_tokens*", "frozen": True}]},
    ],
    ids=["adapters", "a layer", "embedding"],
)
def test_frozen_weights_are_held_as_they_are_stored(
    make_recipe: Callable[..., Path],
    student_folder: Path,
    tmp_path: Path,
    frozen: dict[str, object],
    num_ranks: int,
) -> None:
    """In half the memory, where that is bfloat16 and so is the computation: the training is that of
    a student whose file has the same weights in float32, bit for bit.
    """
    narrow, wide = (shutil.copytree(student_folder, tmp_path / name) for name in ("16", "32"))
    weights = {
        name: weight.bfloat16()
        for name, weight in load_file(student_folder / "model.safetensors").items()
    }
    save_file(weights, narrow / "model.safetensors", {"format": "pt"})
    save_file(
        {n: w.float() for n, w in weights.items()}, wide / "model.safetensors", {"format": "pt"}
    )
    found = []
    for folder in (narrow, wide):
        overrides = {
            "student.model.path": str(folder),
            "student.compute_dtype": "bfloat16",
            "student.max_steps": 3,
        }
        run = load_run(str(make_recipe(num_ranks=num_ranks, lr=0.02)), overrides | frozen)
        ref = run_inline(run, until="train", launched={"train"})["student"]
        losses = [r["loss"] for r in read_metrics(Path(ref.uri) / "metrics.jsonl")]
        found.append((losses, load_file(Path(ref.uri) / "model/model.safetensors")))
    (losses, exported), (expected_losses, expected) = found
    assert losses == expected_losses
    assert len(set(losses)) == 3
    for name, weight in expected.items():
        assert torch.equal(exported[name], weight), name
