"""Mixtures of experts: how even the routing is, as transformers has it, for every architecture
that has such a loss.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from configs.schema.algorithm import SFTConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients, MicroBatch
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.models.families import BY_ARCHITECTURE
from kdflow_core.models.routing import balance, routers, routing_of
from kdflow_core.models.structure import decoder_layers, meta_model
from kdflow_core.student.module import DistillationModule, shard, student_mesh
from kdflow_core.student.step import collate
from tests.processes import run_ranks
from tests.tiny_models import TRUE_VOCABULARY, tiny_model

SEQUENCES = [list(range(3, 12)), list(range(20, 25))]
# Those of transformers' models that have the loss.
BALANCED = [
    "Ernie4_5_MoeForCausalLM",
    "FlexOlmoForCausalLM",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM",
]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and where tokens are."""
    rows = [torch.tensor(ids) for ids in SEQUENCES]
    return pad_sequence(rows, batch_first=True), pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True
    )


def module_of(
    model: PreTrainedModel, weight: float | None, product_dtype: torch.dtype | None = None
) -> DistillationModule:
    """It learns the tokens, and to route evenly."""
    size = model.config.get_text_config().vocab_size
    spec = LossSpec(divergence=None, kd_ratio=0.0, logits_bytes=2**20)
    ingredients = Ingredients(spec=spec, model=model, heads={}, vocabulary_size=size)
    module = DistillationModule(
        model=model,
        algorithm=build_algorithm(SFTConfig(type="sft"), ingredients),
        vocabulary_size=size,
        routing=routing_of(model, weight),
        product_dtype=product_dtype,
    )
    module.train()
    return module


def batch_of(module: DistillationModule, *sequences: list[int]) -> MicroBatch:
    """All of the sequences is learned, each token the same."""
    tokens = [
        TokenSequence(ids_T=np.array(ids, np.int32), supervised_T=np.arange(len(ids)) > 0)
        for ids in sequences
    ]
    return collate(
        [Example(source="x", views={"student": sequence}) for sequence in tokens],
        module.algorithm,
        (),
        weight=1 / sum(len(ids) - 1 for ids in sequences),
        empty=False,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("architecture", BALANCED)
def test_it_is_that_of_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, tmp_path)
    routing = routing_of(model, None)
    assert routing is not None
    ids_BT, mask_BT = padded()
    told = model(input_ids=ids_BT, attention_mask=mask_BT, output_router_logits=True)
    module = module_of(model, None).eval()  # some have noise in training
    batch = batch_of(module, *SEQUENCES).student
    states_NH, even = batch.balanced_states_of(model, routing)
    torch.testing.assert_close(even, told.aux_loss, rtol=1e-5, atol=0)
    assert torch.equal(states_NH, batch.states_of(model))
    gradients = []
    for loss in (even, told.aux_loss):
        loss.backward()
        named = model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_transformers(tmp_path: Path, checkpointing: bool) -> None:
    """Of its own training loss for one sequence, whose tokens are all learned."""
    model = tiny_model("Qwen3MoeForCausalLM", tmp_path, vocab_size=TRUE_VOCABULARY)
    model.router_aux_loss_coef = 0.3
    ids_BT = torch.tensor(SEQUENCES[:1])
    own = model(input_ids=ids_BT, labels=ids_BT, output_router_logits=True).loss
    own.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = module_of(model, 0.3)
    batch = batch_of(module, SEQUENCES[0])
    output = module(batch)
    torch.testing.assert_close(output.loss, own, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.terms["loss"].mean(), own, rtol=1e-5, atol=0)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6)
    with torch.no_grad():  # what is measured has no part of it
        measured = module(batch, algorithm=module.algorithm)
    assert "router_balance" not in measured.terms


def test_even_routing_has_the_number_of_experts_per_token(tmp_path: Path) -> None:
    routing = routing_of(tiny_model("MixtralForCausalLM", tmp_path), None)
    assert routing is not None
    even_SE = torch.eye(4).repeat(5, 1) + torch.eye(4).roll(1, 0).repeat(5, 1)
    assert balance([even_SE, even_SE], routing).item() == pytest.approx(2.0)
    uneven_SE = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).repeat(20, 1)
    assert balance([uneven_SE], routing).item() == pytest.approx(4.0, rel=1e-3)


def test_experts_in_no_layer(tmp_path: Path) -> None:
    """As where the layers that have them were dropped."""
    model = tiny_model("Qwen3MoeForCausalLM", tmp_path, mlp_only_layers=[0, 1])
    assert model.router_aux_loss_coef
    assert routing_of(model, None) is None
    with pytest.raises(ModelError, match="has no routers"):
        routing_of(model, 0.1)


def test_what_cannot_be_had_is_refused_by_name() -> None:
    llama = meta_model(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32))
    assert routing_of(llama, None) is None
    assert routing_of(llama, 0.0) is None
    with pytest.raises(ModelError, match=r"router_aux_loss_coef=0\.01: LlamaForCausalLM has no"):
        routing_of(llama, 0.01)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "router_aux_loss_coef": 0.02}
    moe = meta_model(transformers.MixtralConfig(**sizes))
    assert routing_of(moe, 0.0, compiled=True) is None
    with pytest.raises(ModelError, match=r"set student\.router_aux_loss_coef=0, or turn compile"):
        routing_of(moe, None, compiled=True)


def step_in_bfloat16(rank: int, folder: str, wide: bool) -> None:
    """What the routers of each model read and hold in a step; and the dtypes of its states."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=1)
    found = {}
    for architecture in sorted(BY_ARCHITECTURE):
        model = tiny_model(architecture, Path(folder, architecture))
        seen: set[tuple[torch.dtype, ...]] = set()
        for router in routers(model):
            _spy(router, seen)
        module = module_of(model, None, torch.bfloat16 if wide else None)
        assert (module.routing is not None) == (architecture in BALANCED), architecture
        mesh = student_mesh(torch.device("cpu"), replicas=1)
        shard(module, mesh=mesh, compute_dtype=torch.bfloat16)
        states: set[torch.dtype] = set()
        for layer in decoder_layers(model):
            layer.register_forward_hook(partial(_note_state, states))
        output = module(batch_of(module, SEQUENCES[0]))
        output.loss.backward()
        assert not wide or states == {torch.float32}, (architecture, states)
        assert module.routing is None or output.terms["router_balance"].isfinite().all()
        for name, parameter in module.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.to_local()
            assert gradient is None or gradient.isfinite().all(), (architecture, name)
        found[architecture] = seen
    torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def _spy(router: torch.nn.Module, seen: set[tuple[torch.dtype, ...]]) -> None:
    inner = router.forward

    def forward(hidden: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.add((hidden.dtype, next(router.parameters()).dtype))
        return inner(hidden, *rest, **more)

    router.forward = forward


def _note_state(states: set[torch.dtype], _module: torch.nn.Module, _inputs: Any, out: Any) -> None:
    states.add((out[0] if isinstance(out, tuple) else out).dtype)


@pytest.mark.ranks
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide residual"])
def test_every_architecture_trains_in_bfloat16_and_its_routers_in_float32(
    tmp_path: Path, wide: bool
) -> None:
    run_ranks(step_in_bfloat16, str(tmp_path), wide, ranks=1)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == BY_ARCHITECTURE.keys()
    for architecture in BALANCED:
        assert found[architecture] == {(torch.float32, torch.float32)}, architecture
