"""GPT-2 and GPT-NeoX, whose tensors have names of their own."""

from kdflow_core.models.families.base import Family, HeadRule

GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    head=HeadRule(embedding="transformer.wte.weight"),
    layers="h",
    loads_bare_names=True,
)
GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    head=HeadRule(
        weight="embed_out.weight", bias="embed_out.bias", embedding="gpt_neox.embed_in.weight"
    ),
)
