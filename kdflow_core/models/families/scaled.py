"""Families that scale or cap their logits: Cohere, Gemma 2 and 3, Granite."""

from kdflow_core.models.families.base import Family, HeadRule

COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM", "Cohere2ForCausalLM"),
    head=HeadRule(multiplier="logit_scale"),
)
GEMMA = Family(
    name="gemma",
    architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    head=HeadRule(softcap="final_logit_softcapping"),
    capped_attention="attn_logit_softcapping",
)
GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM", "GraniteMoeForCausalLM"),
    head=HeadRule(divisor="logits_scaling"),
)
