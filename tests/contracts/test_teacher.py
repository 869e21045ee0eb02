"""What every teacher engine must do. A backend is added to `BACKENDS`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from configs.schema.teacher import Teacher
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import apply_head, load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.teacher import ENGINES, build_engine
from kdflow_core.teacher.streaming import stream_states
from tests.conftest import VOCABULARY

LENGTHS = (2, 17, 64, 3, 40, 17, 9)
CPU = torch.device("cpu")
BACKENDS: dict[str, dict[str, object]] = {"transformers": {}, "sglang": {}}
Build = Callable[..., TeacherEngine]


def test_every_backend_is_in_the_suite() -> None:
    assert BACKENDS.keys() | {"sglang_server"} == ENGINES.keys()  # it has a test file of its own


def make_engine(backend: str, folder: Path, **options: object) -> TeacherEngine:
    if backend == "transformers" and "Gemma2" in (folder / "config.json").read_text():
        options["attention"] = "eager"  # the others have no soft-cap
    config = {
        "type": backend,
        "model": {"type": "pretrained", "path": str(folder)},
        "dtype": "float32",
        "tokens_per_batch": 64,
    }
    return build_engine(
        TypeAdapter(Teacher).validate_python(config | BACKENDS[backend] | options),
        folder=folder,
        head=load_head(folder, load_config(folder), VOCABULARY),
        longest=max(LENGTHS),
        device=CPU,
    )


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build(backend: str, teacher_folder: Path) -> Iterator[Build]:
    """Engines over the tiny Llama, closed at the end: SGLang has room for one in a process."""
    engines: list[TeacherEngine] = []

    def make(folder: Path = teacher_folder, **options: object) -> TeacherEngine:
        for engine in engines:
            engine.close()
        engines.append(make_engine(backend, folder, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    result = []
    for length in LENGTHS:
        supervised_T = rng.random(length) < 0.5
        supervised_T[0], supervised_T[-1] = False, True
        result.append(
            TokenSequence(
                ids_T=rng.integers(0, 390, length).astype(np.int32), supervised_T=supervised_T
            )
        )
    return result


def states_of(engine: TeacherEngine, window_tokens: int = 100) -> list[torch.Tensor]:
    return list(stream_states(engine, sequences(), window_tokens=window_tokens))


def reference(folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers on one sequence at a time, unpadded: all states [T, H] and logits [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    states = []
    for sequence in sequences():
        with torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(sequence.ids_T).long()[None], output_hidden_states=True
            )
        states.append((output.hidden_states[-1][0].float(), output.logits[0].float()))
    return states


def exact_and_bfloat16(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The states [N, H] that transformers gives in float32, and those in bfloat16."""
    exact, rounded = [], []
    for sequence, (exact_TH, _), (bf16_TH, _) in zip(
        sequences(),
        reference(folder, torch.float32),
        reference(folder, torch.bfloat16),
        strict=True,
    ):
        exact.append(exact_TH[sequence.target_positions_N - 1])
        rounded.append(bf16_TH[sequence.target_positions_N - 1])
    return exact, rounded


def relative_error(given: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = torch.cat(
        [(g.float() - e).flatten() for g, e in zip(given, expected, strict=True)]
    )
    return (difference.norm() / torch.cat([e.flatten() for e in expected]).norm()).item()


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_states_are_the_models_own_in_order_whatever_the_batches(
    build: Build, teacher_folder: Path, tokens: int
) -> None:
    given = states_of(build(tokens_per_batch=tokens))
    for sequence, states_NH, (expected_TH, _) in zip(
        sequences(), given, reference(teacher_folder, torch.float32), strict=True
    ):
        assert states_NH.dtype == torch.bfloat16
        expected_NH = expected_TH[sequence.target_positions_N - 1]
        assert relative_error([states_NH], [expected_NH]) < 2**-8  # rounding to bfloat16


FAMILY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 448,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**FAMILY)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**FAMILY, **MOE)),
    # Caps so low that a forgotten one shows.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**FAMILY, **GEMMA, attn_logit_softcapping=0.5, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**FAMILY, **GEMMA)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    MODELS[request.param]().save_pretrained(folder)
    if request.param == "gemma2":  # as in the published checkpoints, which SGLang reads it from
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"hidden_act": config["hidden_activation"]}))
    return folder


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives not-a-number, in place of what happens to be there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_families_in_float32_and_their_logits(build: Build, family_folder: Path) -> None:
    """Dense, mixture of experts, soft-capped and windowed: states, and logits rebuilt from them."""
    given = states_of(build(family_folder))
    head = load_head(family_folder, load_config(family_folder), VOCABULARY)
    expected, logits, rebuilt = [], [], []
    for sequence, states_NH, (states_TH, logits_TV) in zip(
        sequences(), given, reference(family_folder, torch.float32), strict=True
    ):
        expected.append(states_TH[sequence.target_positions_N - 1])
        logits.append(logits_TV[sequence.target_positions_N - 1, :VOCABULARY])
        rebuilt.append(apply_head(states_NH, head))
    assert relative_error(given, expected) < 2**-8
    assert relative_error(rebuilt, logits) < 2**-7


def test_bfloat16_is_as_exact_as_that_of_transformers(build: Build, family_folder: Path) -> None:
    given = states_of(build(family_folder, dtype="bfloat16"))
    expected, theirs = exact_and_bfloat16(family_folder)
    assert relative_error(given, expected) <= 1.25 * relative_error(theirs, expected)


def test_a_sequence_of_the_context_limit_and_one_beyond(build: Build, teacher_folder: Path) -> None:
    """The tiny Llama has 256 positions."""
    engine = build()
    assert engine.max_length == 256
    long = TokenSequence(ids_T=np.arange(257, dtype=np.int32), supervised_T=np.arange(257) == 256)
    with pytest.raises(ModelError, match="a sequence has 257 tokens, the teacher's context is 256"):
        list(stream_states(engine, [long], window_tokens=64))


def test_sleep_and_wake(build: Build) -> None:
    engine = build()
    before = states_of(engine)
    for _ in range(2):
        engine.sleep()
        engine.sleep()
        engine.wake()
        engine.wake()
        for one, two in zip(before, states_of(engine), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_close_twice_and_use_after_close(build: Build) -> None:
    engine = build()
    engine.close()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        engine.forward(sequences()[:1])


def test_no_sequences_no_states(build: Build) -> None:
    assert list(stream_states(build(), [], window_tokens=64)) == []


def test_a_head_that_is_not_the_models_is_refused(backend: str, teacher_folder: Path) -> None:
    head = load_head(teacher_folder, load_config(teacher_folder), VOCABULARY)
    wrong = type(head)(weight_VH=head.weight_VH.roll(1, 0))
    config = {"type": backend, "model": {"type": "pretrained", "path": "x"}, "dtype": "float32"}
    with pytest.raises(ModelError, match="relative error"):
        build_engine(
            TypeAdapter(Teacher).validate_python(config),
            folder=teacher_folder,
            head=wrong,
            longest=64,
            device=CPU,
        )


def test_sglang_refuses_a_batch_that_memory_has_no_room_for(teacher_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"short, lower teacher\.tokens_per_batch"):
        make_engine("sglang", teacher_folder, memory_fraction=0.01, tokens_per_batch=10_000_000)


def test_sglang_refuses_an_architecture_that_it_does_not_run(tmp_path: Path) -> None:
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    GlmForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not run GlmForCausalLM; set teacher"):
        make_engine("sglang", tmp_path)


def test_an_attention_that_would_forget_the_soft_cap_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS["gemma2"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="attention=sdpa leaves out without a word; set attention"):
        load_causal_lm(tmp_path, dtype=torch.float32, attention="sdpa")


def test_pages_of_sglangs_cache_are_filled_whole(teacher_folder: Path) -> None:
    """With pages of 64 tokens, as on Blackwell (SGLang has a paged cache on accelerators alone): a
    batch has no more than the cache has room for, which whole pages fill.
    """
    engine = make_engine("sglang", teacher_folder, tokens_per_batch=250)
    try:
        engine._runner.page_size = 64
        assert [len(batch) for batch in engine.pack([17] * 8)] == [3, 3, 2]
        assert engine.pack([300, 65]) == [[0], [1]]
        assert engine._runner._runner.max_total_num_tokens % 64 == 0
    finally:
        engine.close()
