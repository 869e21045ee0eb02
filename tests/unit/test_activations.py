"""The share of a GPU that the teacher takes, by SGLang's own accounting of what that leaves."""

import warnings
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from kdflow_core.teacher.activations import activation_bytes, static_fraction

GIB = 2**30
TOKENS = 16_384
# As their configs have it; weights in bfloat16.
QWEN3_30B_A3B = {
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
}  # fmt: skip
QWEN3_14B = {
    "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 17408, "num_hidden_layers": 40,
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "num_hidden_layers": 36,
}  # fmt: skip
QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728}


def room_for_cache(monkeypatch: pytest.MonkeyPatch, free: int, weights: int, share: float) -> int:
    """What SGLang finds for its cache, in bytes, after it has loaded weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.mem_cache import kv_cache_configurator as module

    replies = {
        "get_available_gpu_memory": lambda *_, **__: (free - weights) / GIB,
        "get_schedule": lambda: Mock(mem_fraction_static=share, prefill_max_requests=None),
        "get_exec": Mock,
        "get_disagg": Mock,
        "get_parallel": lambda: SimpleNamespace(
            launch_world_size=1, world_group=SimpleNamespace(cpu_group=None)
        ),
        "get_mm": lambda: SimpleNamespace(mm_feature_transport=None),
        "mm_runtime_reservation_gb": lambda **_: 0.0,
    }
    for name in replies.keys() & vars(module).keys():  # releases differ in what they ask
        monkeypatch.setattr(module, name, replies[name])
    (configurator,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and hasattr(value, "_profile_available_bytes")
    )
    runner = SimpleNamespace(
        device="cuda", gpu_id=0, mambaish_config=None,
        model_config=SimpleNamespace(is_multimodal=False),
    )  # fmt: skip
    found: int = configurator._profile_available_bytes(runner, free / GIB)
    return found


@pytest.mark.parametrize(
    ("config", "weights", "free"),
    [
        (QWEN3_30B_A3B, 61_100_000_000, int(79.1 * GIB)),
        (QWEN3_14B, 29_500_000_000, int(39.4 * GIB)),
        (QWEN3_8B, 16_400_000_000, int(23.6 * GIB)),
        (QWEN3_4B, 8_000_000_000, int(20 * GIB)),  # a device of which 60 GB are taken
    ],
)
def test_models_fit_where_their_weights_and_a_batch_do(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], weights: int, free: int
) -> None:
    activations = activation_bytes(config, tokens=TOKENS, itemsize=2)
    share = static_fraction(free_bytes=free, activations=activations)
    kept = config["num_key_value_heads"] * config["head_dim"]
    cache = TOKENS * config["num_hidden_layers"] * 2 * kept * 2
    assert room_for_cache(monkeypatch, free, weights, share) >= cache
    assert (1 - share) * free >= activations


def test_activations_are_those_of_the_widest_layer() -> None:
    """As tensors of a dense layer: six of its width, gate and up and their product."""
    tensors = 6 * 4096 + 3 * 12288
    assert activation_bytes(QWEN3_8B, tokens=10, itemsize=2) == 10 * tensors * 2
    fewer = activation_bytes(QWEN3_30B_A3B | {"num_experts_per_tok": 2}, tokens=10, itemsize=2)
    assert fewer < activation_bytes(QWEN3_30B_A3B, tokens=10, itemsize=2)


def test_there_is_always_a_share() -> None:
    assert static_fraction(free_bytes=GIB, activations=5 * GIB) == pytest.approx(0.05)
