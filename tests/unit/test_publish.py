"""What a publisher sends is what transformers would save."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kdflow_core.student.publish import WeightPublisher


@pytest.fixture
def mixture() -> PreTrainedModel:
    """Its experts are many tensors in a file, and two in memory."""
    config = Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("bucket_bytes", [1, 4000, 10**9])
def test_a_mixture_of_experts_goes_by_the_names_of_its_files(
    mixture: PreTrainedModel, tmp_path: Path, bucket_bytes: int
) -> None:
    mixture.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    publisher = WeightPublisher(
        mixture, dtype=torch.float32, bucket_bytes=bucket_bytes, checkpoint_names=True
    )
    sent = {}
    for number in range(publisher.num_buckets):
        bucket = publisher.write(number)
        assert bucket is not None
        named = bucket.open()
        sent |= {name: tensor.clone() for name, tensor in named}
        # A broadcast goes by this order on both sides.
        told = publisher.describe(number)
        assert [(t["name"], torch.Size(t["shape"])) for t in told] == [
            (name, tensor.shape) for name, tensor in named
        ]
    assert sent.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(sent[name], tensor), name
    assert sum(tensor.nbytes for tensor in saved.values()) == publisher.num_bytes
