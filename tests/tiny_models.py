"""Random models of every architecture that kdflow knows, small enough to be made in a moment."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

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
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED = MOE | {"shared_expert_intermediate_size": 16, "n_shared_experts": 1, "topk_group": 1}
INDEXED = DEEPSEEK | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
MIXED = ["sliding_attention", "full_attention"]
EXTRA: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"logit_scale": 0.25},
    "Cohere2ForCausalLM": {"logit_scale": 0.25},
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "GPT2LMHeadModel": GPT,
    "Gemma2ForCausalLM": {"final_logit_softcapping": 1.5},
    "Gemma3ForCausalLM": {"final_logit_softcapping": 1.5},
    "Glm4MoeForCausalLM": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "GptOssForCausalLM": MOE,
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "GraniteMoeForCausalLM": MOE | {"logits_scaling": 4.0},
    "MixtralForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE | {"shared_expert_intermediate_size": 16},
    "Qwen3MoeForCausalLM": MOE,
    "AfmoeForCausalLM": SHARED,
    "BambaForCausalLM": MAMBA | {"attn_layer_indices": [1]},
    "Cohere2MoeForCausalLM": MOE | {"logit_scale": 0.25},
    "DeepseekV32ForCausalLM": INDEXED,
    "Dots1ForCausalLM": DEEPSEEK | {"n_shared_experts": 1},
    "Ernie4_5_MoeForCausalLM": SHARED,
    "ExaoneMoeForCausalLM": SHARED,
    "FalconForCausalLM": {"num_kv_heads": 2},
    "FalconH1ForCausalLM": MAMBA | {"lm_head_multiplier": 0.5},
    "FlexOlmoForCausalLM": MOE,
    "GPTBigCodeForCausalLM": GPT,
    "GPTJForCausalLM": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
    },
    "CodeGenForCausalLM": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
    },
    "GPTNeoForCausalLM": {"num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {
        "final_logit_softcapping": 1.5,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": MIXED * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "laurel_rank": 4,
    },
    "Gemma4ForCausalLM": {
        "final_logit_softcapping": 1.5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    "Glm4MoeLiteForCausalLM": DEEPSEEK,
    "GlmMoeDsaForCausalLM": INDEXED,
    "GraniteMoeHybridForCausalLM": MAMBA
    | MOE
    | {
        "logits_scaling": 4.0,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "GraniteMoeSharedForCausalLM": MOE | {"logits_scaling": 4.0},
    "HYV3ForCausalLM": SHARED | {"expert_hidden_dim": 16},
    "HunYuanMoEV1ForCausalLM": MOE,
    "HyperCLOVAXForCausalLM": {"logits_scaling": 4.0},
    "JambaForCausalLM": MOE | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "JetMoeForCausalLM": MOE | {"kv_channels": 8},
    "LagunaForCausalLM": SHARED,
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "Lfm2MoeForCausalLM": MOE | {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "chunk_size": 8,
        "n_groups": 1,
    },
    "MellumForCausalLM": MOE,
    "MiniMaxForCausalLM": MOE,
    "MiniMaxM2ForCausalLM": MOE,
    "NanoChatForCausalLM": {"final_logit_softcapping": 1.5},
    "NemotronHForCausalLM": MAMBA
    | SHARED
    | {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "moe_shared_expert_intermediate_size": 16,
        "n_groups": 1,
        "n_routed_experts": 4,
    },
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "OlmoeForCausalLM": MOE,
    "PhimoeForCausalLM": MOE | {"lm_head_bias": True},
    "OlmoHybridForCausalLM": LINEAR,
    "Qwen3NextForCausalLM": SHARED | LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": SHARED | LINEAR,
    "RecurrentGemmaForCausalLM": {
        "logits_soft_cap": 1.5,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 16,
        "lru_width": 32,
    },
    "SolarOpenForCausalLM": SHARED,
    "VaultGemmaForCausalLM": {"final_logit_softcapping": 1.5},
    "XGLMForCausalLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "YoutuForCausalLM": DEEPSEEK,
    "AriaTextForCausalLM": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "Zamba2ForCausalLM": MAMBA
    | {
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
}


def tiny_model(architecture: str, folder: Path, **sizes: Any) -> torch.nn.Module:
    """A random model with a padded vocabulary, saved and loaded as a user's would be."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in the code of some families
        model_class = getattr(transformers, architecture)
    settings = SIZES | EXTRA.get(architecture, {}) | sizes
    if architecture == "FalconForCausalLM":  # whose config takes none
        del settings["head_dim"]
    config = model_class.config_class(**settings)
    config.initializer_range = 0.2
    model_class(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
