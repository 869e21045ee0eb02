"""Output heads: for every architecture that kdflow knows, logits rebuilt from hidden states are the
model's own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.models.families import BY_ARCHITECTURE
from kdflow_core.models.heads import (
    apply_head,
    live_head,
    load_head,
    verify_head,
)

VOCABULARY, TRUE_VOCABULARY = 96, 90
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
DEEPSEEK = MOE | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
EXTRA: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"logit_scale": 0.25},
    "Cohere2ForCausalLM": {"logit_scale": 0.25},
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 1.5},
    "Gemma3ForCausalLM": {"final_logit_softcapping": 1.5},
    "Glm4MoeForCausalLM": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "GptOssForCausalLM": MOE,
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "GraniteMoeForCausalLM": MOE | {"logits_scaling": 4.0},
    "MixtralForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE | {"shared_expert_intermediate_size": 16},
    "Qwen3MoeForCausalLM": MOE,
}


def tiny_model(architecture: str, folder: Path, **sizes: int) -> torch.nn.Module:
    """A random model with a padded vocabulary, saved and loaded as a user's would be."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**SIZES | EXTRA.get(architecture, {}) | sizes)
    config.initializer_range = 0.2
    model_class(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_rebuilt_logits_are_the_models_own(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, tmp_path)
    ids_BT = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        own_TV = model(input_ids=ids_BT, use_cache=False).logits[0, :, :TRUE_VOCABULARY]
        hidden_TH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[0]
        config = AutoConfig.from_pretrained(tmp_path)
        for head in (
            load_head(tmp_path, config, TRUE_VOCABULARY),
            live_head(model, TRUE_VOCABULARY),
        ):
            torch.testing.assert_close(apply_head(hidden_TH, head), own_TV, rtol=1e-4, atol=1e-5)
    verify_head(model, load_head(tmp_path, config, TRUE_VOCABULARY))


def test_sharded_checkpoints_are_read_by_their_index(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    heads = [
        load_head(tmp_path / name, AutoConfig.from_pretrained(tmp_path / name), TRUE_VOCABULARY)
        for name in ("one", "many")
    ]
    assert torch.equal(heads[0].weight_VH, heads[1].weight_VH)


def test_a_head_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model = tiny_model("Gemma2ForCausalLM", tmp_path)
    head = live_head(model, TRUE_VOCABULARY)
    with pytest.raises(ModelError, match="its head is not understood"):
        verify_head(model, OutputHead(weight_VH=head.weight_VH, softcap=None))


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(architectures=["RwkvForCausalLM"])
    with pytest.raises(ModelError, match="head of RwkvForCausalLM is not known"):
        load_head(tmp_path, config, 10)


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM", tmp_path)
    with pytest.raises(ModelError, match="has 96 rows, the tokenizer 200 ids"):
        load_head(tmp_path, AutoConfig.from_pretrained(tmp_path), 200)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        load_head(tmp_path, config, 10)
