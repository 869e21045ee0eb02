"""Output heads: for every architecture that kdflow knows, logits rebuilt from hidden states are the
model's own.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema.student import LoraConfig
from kdflow_core.algorithms.base import TokenBatch
from kdflow_core.contracts import OutputHead
from kdflow_core.errors import ModelError
from kdflow_core.losses.chunked import distillation_loss
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.models.families import BY_ARCHITECTURE
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.heads import (
    apply_head,
    live_head,
    load_head,
    verify_head,
)
from kdflow_core.models.spread import comes_in_parts, spread_
from kdflow_core.models.structure import adapter_targets, decoder_layers
from kdflow_core.rollout.base import Prompt, Sampling
from kdflow_core.rollout.decoding import generate_ids
from kdflow_core.student.lora import add_adapters, save_adapter, served_weights
from tests.tiny_models import TRUE_VOCABULARY, tiny_model

# With layers beside the experts, whose adapters PEFT takes for those of the experts.
READ_AMISS = {
    "AfmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Dots1ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneMoeForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "LagunaForCausalLM",
    "Qwen3NextForCausalLM",
    "SolarOpenForCausalLM",
}


@dataclass(frozen=True)
class Saved:
    """A tiny model and the folder that it was loaded from."""

    model: torch.nn.Module
    folder: Path


@pytest.fixture(scope="module", params=sorted(BY_ARCHITECTURE))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("model")
    return Saved(tiny_model(request.param, folder), folder)


def test_rebuilt_logits_are_the_models_own(saved: Saved) -> None:
    ids_BT = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        own_TV = saved.model(input_ids=ids_BT, use_cache=False).logits[0, :, :TRUE_VOCABULARY]
        hidden_BTH = saved.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        config = AutoConfig.from_pretrained(saved.folder)
        for head in (
            load_head(saved.folder, config, TRUE_VOCABULARY),
            live_head(saved.model, TRUE_VOCABULARY),
        ):
            torch.testing.assert_close(
                apply_head(hidden_BTH[0], head), own_TV, rtol=1e-4, atol=1e-5
            )
    verify_head(saved.model, load_head(saved.folder, config, TRUE_VOCABULARY))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_layers_that_come_from_the_hosts_memory_give_the_models_own(saved: Saved) -> None:
    """In a forward pass, and where tokens follow one by one, with what is kept of earlier ones."""
    whole, spread = (
        AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.float32).eval()
        for _ in range(2)
    )
    places = spread_(spread, [(torch.device("cpu"), 0)])
    assert all(place.comes for place in places)
    assert comes_in_parts(spread)
    assert not comes_in_parts(whole)
    ids_BT = torch.randint(TRUE_VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = [post_norm_states(model.base_model, ids_BT) for model in (whole, spread)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    answers = [
        generate_ids(
            model=model,
            vocabulary_size=TRUE_VOCABULARY,
            prompts=[Prompt(ids_T=ids_BT[0].numpy(), max_new_tokens=4)],
            sampling=Sampling(temperature=0.0, stop_ids=(), log_probs=False),
        )[0].ids_N.tolist()
        for model in (whole, spread)
    ]
    assert answers[1] == answers[0]


def test_a_padded_training_step_is_that_of_the_sequences_alone(saved: Saved) -> None:
    """All tokens of two sequences, padded to one length: value and gradients of cross-entropy are
    those of the model's own logits, and the layers are where sharding looks for them.
    """
    model = saved.model
    assert len(decoder_layers(model)) >= 2
    sequences = [list(range(3, 12)), list(range(20, 25))]
    own = sum(
        F.cross_entropy(
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1, :TRUE_VOCABULARY],
            torch.tensor(ids[1:]),
            reduction="sum",
        )
        for ids in sequences
    )
    wanted = gradients(model, own)
    batch = TokenBatch(
        ids_BT=pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True),
        row_N=torch.tensor([row for row, ids in enumerate(sequences) for _ in ids[1:]]),
        position_N=torch.tensor([k for ids in sequences for k in range(len(ids) - 1)]),
    )
    targets_N = torch.tensor([token for ids in sequences for token in ids[1:]])
    output = distillation_loss(
        student_hidden_TH=batch.states_of(model),
        student_head=live_head(model, TRUE_VOCABULARY),
        teacher=None,
        target_ids_T=targets_N,
        weights_T=torch.ones(len(targets_N)),
        spec=LossSpec(divergence=None, kd_ratio=0.0, logits_bytes=2**20),
    )
    torch.testing.assert_close(output.loss, own, rtol=1e-5, atol=1e-5)
    found = gradients(model, output.loss)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: n + m
        )


def test_adapters_learn_wherever_they_are_put(saved: Saved, tmp_path: Path) -> None:
    """By default: on all linear layers of the decoder, each with a gradient, and what is served has
    them merged. Falcon's and GPT-2's layers are no linear ones.
    """
    architecture = type(saved.model).__name__
    model = tiny_model(architecture, tmp_path)
    if architecture in {"FalconForCausalLM", "GPT2LMHeadModel"}:
        with pytest.raises(ModelError, match=r"student\.lora"):
            add_adapters(model, LoraConfig())
        return
    targets = adapter_targets(model, None)
    add_adapters(model, LoraConfig())
    named = dict(model.named_parameters())
    assert {name.partition(".lora_A")[0] for name in named if ".lora_A" in name} == set(targets)
    with torch.no_grad():
        for name, parameter in named.items():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    ids_BT = torch.arange(3, 15).unsqueeze(0)
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0]
    logits_TV.square().sum().backward()
    for name, parameter in named.items():
        assert parameter.requires_grad == (".lora_" in name)
        assert not parameter.requires_grad or parameter.grad is not None, name
    merged = {
        name: served.value(named.__getitem__).detach()
        for name, served in served_weights(named, LoraConfig().scale).items()
        if served.a is not None
    }
    with torch.no_grad():
        own_TV = functional_call(saved.model, merged, (ids_BT,), {"use_cache": False}).logits[0]
    torch.testing.assert_close(own_TV, logits_TV, rtol=1e-3, atol=1e-3)
    # By themselves: as PEFT reads them, or not at all.
    adapters = {name: parameter.detach() for name, parameter in named.items()}
    save_adapter(adapters, LoraConfig(), tmp_path / "adapter", model)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    if architecture in READ_AMISS:
        assert files == {"README.md"}
        return
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    read = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        read_TV = read(input_ids=ids_BT, use_cache=False).logits[0]
    torch.testing.assert_close(read_TV, logits_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["MambaForCausalLM", "BambaForCausalLM"])
def test_no_adapter_where_a_fused_kernel_reads_the_weight(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture, tmp_path)
    found = adapter_targets(model, None)
    assert any(name.endswith("in_proj") for name in found)
    assert not any(name.endswith("out_proj") for name in found)
    with pytest.raises(ModelError, match=r"out_proj \(past which its weight is read\)"):
        adapter_targets(model, ("in_proj", "out_proj"))


def test_a_tied_head_keeps_its_bias(tmp_path: Path) -> None:
    model = tiny_model("GPTJForCausalLM", tmp_path, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    model.save_pretrained(tmp_path)
    head = load_head(tmp_path, AutoConfig.from_pretrained(tmp_path), TRUE_VOCABULARY)
    assert torch.equal(head.weight_VH, model.transformer.wte.weight[:TRUE_VOCABULARY])
    verify_head(model, head)


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
