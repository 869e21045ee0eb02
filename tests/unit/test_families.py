"""What is known of model families, against transformers' own models and caches."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdflow_core.errors import ModelError
from kdflow_core.models.families import BY_ARCHITECTURE, FAMILIES, family_of
from kdflow_core.models.families.base import batched_length, cached_values
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.structure import decoder_layers
from tests.readme import ROOT
from tests.tiny_models import tiny_model

ORIGINAL = 16


def test_every_architecture_has_one_family() -> None:
    assert len(BY_ARCHITECTURE) == sum(len(family.architectures) for family in FAMILIES)
    assert f"[{len(BY_ARCHITECTURE)} decoder architectures]" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_layers_and_cache_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    """By a model of the family: its layers, and what its cache holds of a token."""
    model = tiny_model(architecture, tmp_path)
    config = model.config
    assert len(decoder_layers(model)) == config.num_hidden_layers
    own = vars(type(config)())  # what a config of the family has
    plain = {k: v for k, v in config.get_text_config().to_dict().items() if k in own}
    with torch.no_grad():
        output = model(torch.ones(1, 1, dtype=torch.long), use_cache=True)
    layers = getattr(output.get("past_key_values"), "layers", [])
    of_attention = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in of_attention)
    if "kv_lora_rank" in plain:  # of its compressed cache, transformers makes whole heads
        assert kept != cached_values(plain)
    elif len(of_attention) < config.num_hidden_layers:  # the others have a state, or share a cache
        assert kept <= cached_values(plain)
    else:
        assert kept == cached_values(plain)


def test_an_unknown_family_is_refused_by_name() -> None:
    config = LlamaConfig(architectures=["QuiteNewForCausalLM"])
    with pytest.raises(ModelError, match=r"QuiteNewForCausalLM .* scale, soft-cap"):
        family_of(config)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 40),
        ({"rope_type": "linear", "factor": 4.0}, 40),
        ({"rope_type": "dynamic", "factor": 4.0}, ORIGINAL),
        ({"rope_type": "dynamic", "factor": 4.0}, 40),
    ],
)
def test_where_padding_is_exact(rope: dict[str, object], longest: int) -> None:
    """A short row beside a long one has the states that it has alone, or is known not to."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": 10000.0} | rope,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    ids_BT = torch.randint(3, 96, (2, longest))
    short = ORIGINAL - 4
    with torch.no_grad():
        alone_TH = copy.deepcopy(model).base_model(ids_BT[:1, :short]).last_hidden_state[0]
        padded_BT = ids_BT.clone()
        padded_BT[0, short:] = 0
        padded_TH = copy.deepcopy(model).base_model(padded_BT).last_hidden_state[0, :short]
    close = torch.allclose(padded_TH, alone_TH, rtol=1e-4, atol=1e-4)
    most = batched_length(config.to_dict())
    assert close == (most is None or longest <= most)
    # What a model has read before does not matter.
    for lengths in ([40, 30], [40, short], [40, ORIGINAL], [30, 40, 30]):
        read = copy.deepcopy(model)
        for length in lengths:
            ids = torch.randint(3, 96, (1, length))
            states = post_norm_states(read.base_model, ids)
        fresh = copy.deepcopy(model).base_model(ids).last_hidden_state
        torch.testing.assert_close(states, fresh, rtol=0.0, atol=0.0)


def test_the_length_that_may_be_batched_is_the_least_of_all_kinds_of_layers() -> None:
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    plain = {"rope_type": "default"}
    assert batched_length({"rope_parameters": longrope}) == 4096
    assert batched_length({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 9}) == 9
    kinds = {"full_attention": longrope, "sliding_attention": plain}
    assert batched_length({"rope_parameters": kinds}) == 4096
    assert batched_length({"rope_parameters": {"full_attention": plain}}) is None
    assert batched_length({}) is None
