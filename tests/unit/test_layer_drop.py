"""Layers taken out of models whose layers are not alike: what is saved is what was kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kdflow_core.errors import ModelError
from kdflow_core.models.layer_drop import drop_layers, kept_config
from tests.conftest import VOCABULARY, make_tokenizer

LAYERS = 6
SIZES: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "alike": ("Llama", {}),
    "dense ones named": ("Qwen3Moe", MOE | {"mlp_only_layers": [0, 3]}),
    "every second sparse": ("Qwen3Moe", MOE | {"decoder_sparse_step": 2}),
    "every third sparse, one named": (
        "Qwen2Moe",
        MOE
        | {"decoder_sparse_step": 3, "mlp_only_layers": [2], "shared_expert_intermediate_size": 16},
    ),
    "first ones dense": ("Glm4Moe", MOE | ROUTED | {"first_k_dense_replace": 3}),
    "latent attention": (
        "DeepseekV3",
        MOE
        | ROUTED
        | {"first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
    "some without positions": ("SmolLM3", {"no_rope_layer_interval": 4}),
    "windows": ("Gemma3Text", {"head_dim": 8, "sliding_window": 4}),
    "windows by kind": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
    "windows by count": (
        "Qwen2",
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4},
    ),
    "an old one": (
        "GPT2",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    ),
}


def make(folder: Path, name: str, settings: dict[str, Any]) -> torch.nn.Module:
    make_tokenizer(folder, texts=["some text"])
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dropped", [[1, 3], [0], [2, 4, 5]], ids=str)
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_what_is_saved_computes_what_is_left(tmp_path: Path, kind: str, dropped: list[int]) -> None:
    """Against the model itself with the modules taken out of its list."""
    model: Any = make(tmp_path / "whole", *MODELS[kind])
    drop_layers(tmp_path / "whole", tmp_path / "less", dropped)
    less, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "less", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    name = "h" if kind == "an old one" else "layers"
    layers = getattr(model.base_model, name)
    kept = [layer for number, layer in enumerate(layers) if number not in dropped]
    setattr(model.base_model, name, torch.nn.ModuleList(kept))
    model.config.num_hidden_layers = len(kept)
    types = getattr(model.config, "layer_types", None)
    if types:  # the base model asks it for its masks
        model.config.layer_types = [t for i, t in enumerate(types) if i not in dropped]
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(less(input_ids=ids, use_cache=False).logits, expected)


def test_layers_that_no_config_describes_are_refused(tmp_path: Path) -> None:
    """Experts in every second layer from one number to another: no such run is left."""
    more = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_interval": 2}
    spans = {"moe_layer_start_index": 1, "moe_layer_end_index": 5}
    make(tmp_path, "Ernie4_5_Moe", more | spans)
    with pytest.raises(ModelError, match=r"layers of several kinds, .* layer \d .* would be layer"):
        kept_config(tmp_path, [1])


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "Llama", {})
    for dropped in ([LAYERS], list(range(LAYERS))):
        with pytest.raises(ModelError, match="the teacher has layers 0 to 5, and one must stay"):
            kept_config(tmp_path, dropped)
