"""Families whose tensors, or whose list of layers, have names of their own."""

from kdflow_core.models.families.base import Family, HeadRule

BIOGPT = Family(
    name="biogpt",
    architectures=("BioGptForCausalLM",),
    head=HeadRule(
        weight="output_projection.weight",
        bias="output_projection.bias",
        embedding="biogpt.embed_tokens.weight",
    ),
)
BLOOM = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "FalconForCausalLM"),
    head=HeadRule(embedding="transformer.word_embeddings.weight"),
    layers="h",
    unpacked=("BloomForCausalLM", "FalconForCausalLM"),
)
GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    head=HeadRule(embedding="transformer.wte.weight"),
    layers="h",
    loads_bare_names=True,
)
GPT2_KIN = Family(
    name="gpt2_kin",
    architectures=(
        "CodeGenForCausalLM",
        "GPTBigCodeForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoForCausalLM",
    ),
    head=GPT2.head,
    layers=GPT2.layers,
)
GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    head=HeadRule(
        weight="embed_out.weight", bias="embed_out.bias", embedding="gpt_neox.embed_in.weight"
    ),
)
MAMBA = Family(
    name="mamba",
    architectures=("FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"),
    head=HeadRule(embedding="backbone.embeddings.weight"),
    unpacked=("FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"),
)
MPT = Family(
    name="mpt",
    architectures=("MptForCausalLM",),
    head=HeadRule(embedding="transformer.wte.weight"),
    layers="blocks",
    unpacked=("MptForCausalLM",),
)
NEMOTRON_H = Family(
    name="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    head=HeadRule(embedding="model.embeddings.weight"),
    unpacked=("NemotronHForCausalLM",),
)
OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    head=HeadRule(embedding="model.decoder.embed_tokens.weight"),
    layers="decoder.layers",
)
NAMED = (BIOGPT, BLOOM, GPT2, GPT2_KIN, GPT_NEOX, MAMBA, MPT, NEMOTRON_H, OPT)
