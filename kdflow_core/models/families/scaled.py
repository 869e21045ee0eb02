"""Families that scale or cap their logits."""

from kdflow_core.models.families.base import Family, HeadRule

COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
    head=HeadRule(multiplier="logit_scale"),
)
FALCON_H1 = Family(
    name="falcon_h1",
    architectures=("FalconH1ForCausalLM",),
    head=HeadRule(multiplier="lm_head_multiplier"),
    unpacked=("FalconH1ForCausalLM",),
)
GEMMA = Family(
    name="gemma",
    architectures=(
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma4ForCausalLM",
        "VaultGemmaForCausalLM",
    ),
    head=HeadRule(softcap="final_logit_softcapping"),
    capped_attention="attn_logit_softcapping",
)
GRANITE = Family(
    name="granite",
    architectures=(
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSharedForCausalLM",
    ),
    head=HeadRule(divisor="logits_scaling"),
    unpacked=("GraniteMoeHybridForCausalLM",),
)
HYPERCLOVAX = Family(
    name="hyperclovax",
    architectures=("HyperCLOVAXForCausalLM",),
    head=HeadRule(multiplier="logits_scaling"),
)
NANOCHAT = Family(
    name="nanochat",
    architectures=("NanoChatForCausalLM",),
    head=HeadRule(softcap="final_logit_softcapping"),
)
RECURRENT_GEMMA = Family(
    name="recurrent_gemma",
    architectures=("RecurrentGemmaForCausalLM",),
    head=HeadRule(softcap="logits_soft_cap"),
    unpacked=("RecurrentGemmaForCausalLM",),
)
SCALED = (COHERE, FALCON_H1, GEMMA, GRANITE, HYPERCLOVAX, NANOCHAT, RECURRENT_GEMMA)
