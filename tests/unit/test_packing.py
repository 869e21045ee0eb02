"""Rows behind one another have the states and gradients that each has alone, in every family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from kdflow_core.batching import pad_right
from kdflow_core.errors import ModelError
from kdflow_core.models.families import BY_ARCHITECTURE
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.packing import PACKED, PackedRows, packed_attention, packs
from tests.tiny_models import tiny_model

LENGTHS = (9, 1, 14, 5)
EXACT_IN_SOME_RELEASES = {"NemotronForCausalLM"}
EDGES = np.cumsum([0, *LENGTHS]).astype(np.int32)


def with_short_windows(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its weights large, with windows of 3 tokens where its family has any."""
    config = model.config.get_text_config()
    for field, value in (
        ("sliding_window", 3),
        ("attention_chunk_size", 3),
        ("use_sliding_window", True),
        ("max_window_layers", 0),
    ):
        if hasattr(config, field):
            setattr(config, field, value)
    kinds = getattr(config, "layer_types", None)
    if kinds and getattr(config, "use_sliding_window", False):
        config.layer_types = ["sliding_attention"] * len(kinds)
    torch.manual_seed(0)
    model = type(model)(model.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model


def states_and_gradients(
    model: PreTrainedModel, rows: list[torch.Tensor], packed: PackedRows | None
) -> list[torch.Tensor]:
    """The rows' states, back to back, and what a loss of them leaves in the weights."""
    states_TH = torch.cat([post_norm_states(model.base_model, row, packed)[0] for row in rows])
    weights_TH = torch.linspace(-1, 1, states_TH.numel()).reshape(states_TH.shape)
    (states_TH * weights_TH).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [states_TH.detach(), *gradients]


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_packed_is_alone_where_we_say_so(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, tmp_path)
    if model.config.get_text_config().to_dict().get("attn_logit_softcapping") is not None:
        model.config.attn_logit_softcapping = None  # with it, attention=sdpa is refused
    model = with_short_windows(model)
    torch.manual_seed(1)
    rows = [torch.randint(3, 90, (1, length)) for length in LENGTHS]
    if not packs(model.config, packing="auto", attention="sdpa"):
        alone_TH = torch.cat([post_norm_states(model.base_model, row)[0] for row in rows])
        try:
            model.set_attn_implementation(PACKED)
            packed_TH = post_norm_states(
                model.base_model, torch.cat(rows, 1), PackedRows(edges=EDGES)
            )[0]
        except (TypeError, ValueError, ModelError):
            return  # it has no such attention, or is told of no positions
        if architecture in EXACT_IN_SOME_RELEASES:
            return
        assert (packed_TH - alone_TH).norm() > 1e-2 * alone_TH.norm()
        return
    model.set_attn_implementation("sdpa")
    alone = states_and_gradients(model, rows, None)
    model.set_attn_implementation(PACKED)
    packed = states_and_gradients(model, [torch.cat(rows, 1)], PackedRows(edges=EDGES))
    padded_BT = pad_right([row[0].numpy() for row in rows])
    padded_BTH = post_norm_states(model.base_model, padded_BT)
    padded_TH = torch.cat([row[:n] for row, n in zip(padded_BTH, LENGTHS, strict=True)])
    torch.testing.assert_close(padded_TH, alone[0], rtol=1e-4, atol=1e-4)
    # Some gradients, such as that of a key's bias, are nothing but rounding.
    rounding = 1e-6 * max(float(expected.norm()) for expected in alone)
    for found, expected in zip(packed, alone, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + rounding


class Calls(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_on_cuda_rows_go_to_the_kernel_for_many_lengths() -> None:
    """Its shapes and arguments, without a GPU: tensors there that have no values."""
    with FakeTensorMode(), Calls() as calls:
        query, key, value = (
            torch.empty(1, heads, 29, 64, dtype=torch.bfloat16, device="cuda")
            for heads in (4, 2, 2)
        )
        edges = torch.empty(5, dtype=torch.int32, device="cuda")
        told = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 14}
        out, _ = packed_attention(
            torch.nn.Module(), query, key, value, None, scaling=0.1, sliding_window=8, **told
        )
        assert out.shape == (1, 29, 4, 64)
    assert "torch_attn._varlen_attn.default" in calls.names


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_attention_with_more_than_causal_rows_is_refused(more: dict[str, object]) -> None:
    states = torch.zeros(1, 4, 6, 8)
    with pytest.raises(ModelError, match=r"more than causal rows .* set student\.packing=false"):
        packed_attention(torch.nn.Module(), states, states, states, None, **more)


def test_packing_that_is_asked_for_and_not_exact_is_refused(tmp_path: Path) -> None:
    mamba = tiny_model("MambaForCausalLM", tmp_path / "mamba").config
    llama = tiny_model("LlamaForCausalLM", tmp_path / "llama").config
    for config, attention, reason in (
        (mamba, "sdpa", "MambaForCausalLM does not keep packed rows apart"),
        (llama, "eager", r"attention=eager has no packed form \(sdpa has\)"),
    ):
        assert not packs(config, packing="auto", attention=attention)
        with pytest.raises(ModelError, match=f"{reason}; set student.packing=auto"):
            packs(config, packing=True, attention=attention)
    assert packs(llama, packing=True, attention="sdpa")
    assert not packs(llama, packing=False, attention="sdpa")
    with pytest.raises(ModelError, match="own code"):
        packs(llama, packing=True, attention="sdpa", trust_remote_code=True)


def test_attention_that_is_not_told_of_packed_rows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a release of transformers whose layers do not hand it on: rows would run together."""
    model = tiny_model("LlamaForCausalLM", tmp_path)
    model.set_attn_implementation(PACKED)
    attention = model.base_model.layers[1].self_attn
    forward = attention.forward

    def untold(**given: Any) -> Any:
        return forward(**{k: v for k, v in given.items() if not k.startswith("cu_seq_lens")})

    monkeypatch.setattr(attention, "forward", untold)
    ids_BT = torch.arange(3, 3 + sum(LENGTHS))[None]
    with pytest.raises(ModelError, match=r"does not tell LlamaAttention .*packing=false"):
        post_norm_states(model.base_model, ids_BT, PackedRows(edges=EDGES))
    post_norm_states(model.base_model, ids_BT)  # one row, of which there is nothing to tell
