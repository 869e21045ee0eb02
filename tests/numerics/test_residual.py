"""What is summed from layer to layer in float32, beside products in bfloat16: gradients are as near
to those of float32 as autocast's, which are nearer than those of bfloat16 throughout.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdflow_core.student.module import shard, student_mesh
from tests.contracts.test_routing import batch_of, module_of
from tests.processes import run_ranks

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8)),
}
SEQUENCE = [int(token) for token in torch.randint(3, 300, (60,), generator=torch.manual_seed(0))]


def of_the_loop(folder: Path, *, autocast: bool) -> dict[str, torch.Tensor]:
    """Gradients of transformers' own cross-entropy, in float32 or under autocast."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ids_BT = torch.tensor([SEQUENCE])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BTV = model(ids_BT).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV[0, :-1].float(), ids_BT[0, 1:])
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_ours(folder: Path, *, wide: bool) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    module = module_of(model, None, torch.bfloat16 if wide else None)
    shard(module, mesh=student_mesh(torch.device("cpu"), replicas=1), compute_dtype=torch.bfloat16)
    module(batch_of(module, SEQUENCE)).loss.backward()
    named = model.named_parameters()
    return {
        name: (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in named
        if p.grad is not None
    }


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients, relative."""
    assert found.keys() == exact.keys()
    off = sum(float((found[name] - exact[name]).norm() ** 2) for name in exact)
    return float((off / sum(float(own.norm() ** 2) for own in exact.values())) ** 0.5)


def errors_of(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=1)
    found = {}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        own, model = Path(folder, name), build()
        with torch.no_grad():  # as in trained models, it is large beside what a layer adds
            model.get_input_embeddings().weight.mul_(20)
        model.save_pretrained(own)
        exact = of_the_loop(own, autocast=False)
        found[name] = {
            "autocast": error(of_the_loop(own, autocast=True), exact),
            "wide": error(of_ours(own, wide=True), exact),
            "narrow": error(of_ours(own, wide=False), exact),
        }
    torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_gradients_are_as_near_as_those_of_autocast(tmp_path: Path) -> None:
    run_ranks(errors_of, str(tmp_path), ranks=1)
    for name, found in torch.load(tmp_path / "found.pt").items():
        assert found["wide"] < 1.1 * found["autocast"], (name, found)
        assert found["narrow"] > 1.5 * found["wide"], (name, found)
