"""A student that no rank ever has whole: read and written by parts, it is what transformers reads
and writes at once.
"""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema.algorithm import SFTConfig
from configs.schema.student import LoraConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.models.families import BY_ARCHITECTURE
from kdflow_core.models.loading import load_causal_lm
from kdflow_core.models.partial_loading import fill_own_part_, unfilled_causal_lm
from kdflow_core.student.export import export_student
from kdflow_core.student.lora import add_adapters
from kdflow_core.student.module import DistillationModule, shard
from tests.conftest import VOCABULARY
from tests.processes import run_ranks
from tests.tiny_models import tiny_model

RANKS = 3  # no number of rows is a multiple of it
# Their files may have other names, so all of these are read whole.
MAYBE_CONVERTED = {
    "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "Gemma3nForCausalLM",
    "GlmMoeDsaForCausalLM", "Lfm2MoeForCausalLM", "OlmoHybridForCausalLM", "Qwen3_5ForCausalLM",
}  # fmt: skip


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and buffers whether they are saved or not."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_a_model_read_by_parts_is_the_model(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture, tmp_path)
    whole = load_causal_lm(tmp_path, dtype=torch.float32, attention="eager")
    model = unfilled_causal_lm(tmp_path, dtype=torch.float32, attention="eager")
    # Experts, for instance, are one tensor in memory and many in files.
    converted = load_file(tmp_path / "model.safetensors").keys() - whole.state_dict().keys()
    if converted or architecture in MAYBE_CONVERTED:
        assert model is None
        return
    assert model is not None
    fill_own_part_(model, tmp_path)
    own, other = tensors_of(model), tensors_of(whole)
    assert own.keys() == other.keys()
    for name, tensor in other.items():
        assert own[name].dtype == tensor.dtype
        assert torch.equal(own[name], tensor), name
    assert [m.training for m in model.modules()] == [m.training for m in whole.modules()]
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("fault", ["lacks", "has more", "other shape", "no float"])
def test_a_checkpoint_that_is_not_the_models_is_for_the_whole_reader(
    tmp_path: Path, fault: str
) -> None:
    """Which says what is wrong with it."""
    tiny_model("Qwen3ForCausalLM", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    changed = {
        "lacks": {n: t for n, t in tensors.items() if n != name},
        "has more": tensors | {"model.other.weight": tensors[name].clone()},
        "other shape": tensors | {name: tensors[name][:-1].clone()},
        "no float": tensors | {name: tensors[name].to(torch.int8)},
    }
    save_file(changed[fault], path, metadata={"format": "pt"})
    assert unfilled_causal_lm(tmp_path, dtype=torch.float32, attention="eager") is None


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_what_is_not_filled_takes_no_memory(tmp_path: Path) -> None:
    """A model of 800 MB in float32, whose file says so and holds nothing."""
    config = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3,
              "vocab_size": 16384, "num_attention_heads": 16}  # fmt: skip
    model = tiny_model("LlamaForCausalLM", tmp_path, **config)
    size = 4 * sum(p.numel() for p in model.parameters())
    del model
    before = resident_bytes()
    unfilled = unfilled_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")
    assert unfilled is not None
    assert size > 8e8
    assert resident_bytes() - before < size / 20


def build(folder: Path, lora: LoraConfig | None, *, in_parts: bool) -> DistillationModule:
    read = unfilled_causal_lm if in_parts else load_causal_lm
    found = read(folder, dtype=torch.float32, attention="eager")
    assert found is not None
    if lora is not None:
        torch.manual_seed(0)
        add_adapters(found, lora)
    spec = LossSpec(divergence=None, kd_ratio=0.0, logits_bytes=10**6)
    ingredients = Ingredients(spec=spec, model=found, heads={}, vocabulary_size=VOCABULARY)
    algorithm = build_algorithm(SFTConfig(), ingredients)
    module = DistillationModule(model=found, algorithm=algorithm, vocabulary_size=VOCABULARY)
    shard(module, mesh=init_device_mesh("cpu", (RANKS,)), compute_dtype=torch.bfloat16)
    if in_parts:
        fill_own_part_(found, folder)
    return module


class Chat:
    """The tokenizer and the ends of turns that go with the weights."""

    end_ids = (2,)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tokenizer_as_used(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder)


def rank_main(rank: int, folders: list[str], tokenizer: str, target: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{target}/rendezvous", rank=rank, world_size=RANKS
    )
    for number, folder in enumerate(folders):
        lora = LoraConfig(rank=4) if number == 0 else None
        ways = (Path(folder).name != "MixtralForCausalLM", False)  # whose experts are converted
        modules = [build(Path(folder), lora, in_parts=in_parts) for in_parts in ways]
        parts, whole = (tensors_of(module.model) for module in modules)
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            mine = parts[name]
            assert isinstance(mine, DTensor) == isinstance(tensor, DTensor)
            if isinstance(tensor, DTensor) and isinstance(mine, DTensor):
                mine, tensor = mine.to_local(), tensor.to_local()
            assert torch.equal(mine, tensor), name
        chat: Any = Chat(Path(tokenizer))
        for size in (10**9, 20_000):
            export_student(
                modules[0],
                chat=chat,
                dtype=torch.bfloat16,
                model_card="",
                target=Path(target, f"{number}-{size}", "model"),
                lora=lora,
                file_bytes=size,
            )
    dist.destroy_process_group()


@pytest.mark.ranks
def test_ranks_read_and_write_their_parts(tmp_path: Path, student_folder: Path) -> None:
    """A model that does not tie its head, with adapters; one that does; one with experts."""
    names = ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"]
    folders = [tmp_path / name for name in names]
    for folder in folders:
        tiny_model(folder.name, folder)
    paths = [str(folder) for folder in folders]
    run_ranks(rank_main, paths, str(student_folder), str(tmp_path), ranks=RANKS)
    for number, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.config.eos_token_id = model.generation_config.eos_token_id = 2
        model.save_pretrained(tmp_path / "witness")
        one, many = (tmp_path / f"{number}-{size}/model" for size in (10**9, 20_000))
        for file in ("config.json", "generation_config.json"):
            witness = json.loads((tmp_path / "witness" / file).read_text())
            assert json.loads((one / file).read_text()) == witness
            assert filecmp.cmp(one / file, many / file, shallow=False)
        expected = load_file(tmp_path / "witness/model.safetensors")
        found = load_file(one / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name  # an adapter begins as nothing
        assert len(list(many.glob("*.safetensors"))) > 1
        again = AutoModelForCausalLM.from_pretrained(many, dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
