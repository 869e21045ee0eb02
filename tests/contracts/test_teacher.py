"""What every teacher engine must do. A backend is added to `ENGINES`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_config
from kdflow_core.teacher.hf import TransformersTeacherEngine
from tests.conftest import VOCABULARY

LENGTHS = (2, 17, 64, 3, 40, 17, 9)


def transformers_engine(folder: Path, *, tokens: int, max_length: int = 64) -> TeacherEngine:
    return TransformersTeacherEngine(
        folder=folder,
        head=load_head(folder, load_config(folder), VOCABULARY),
        dtype=torch.float32,
        attention="sdpa",
        tokens_per_batch=tokens,
        max_length=max_length,
        device=torch.device("cpu"),
    )


ENGINES = {"transformers": transformers_engine}


@pytest.fixture(params=list(ENGINES))
def build(request: pytest.FixtureRequest, teacher_folder: Path) -> Callable[..., TeacherEngine]:
    return lambda **options: ENGINES[request.param](teacher_folder, **options)


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


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_states_are_the_models_own_in_order_whatever_the_batches(
    build: Callable[..., TeacherEngine], teacher_folder: Path, tokens: int
) -> None:
    """Against transformers run on one sequence at a time, unpadded."""
    engine = build(tokens=tokens)
    states = list(engine.hidden_states(sequences()))
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    for sequence, states_NH in zip(sequences(), states, strict=True):
        ids_BT = torch.from_numpy(sequence.ids_T).long().unsqueeze(0)
        with torch.no_grad():
            output = model(input_ids=ids_BT, output_hidden_states=True)
        expected_NH = output.hidden_states[-1][0, sequence.target_positions_N - 1]
        assert states_NH.dtype == torch.bfloat16
        error = (states_NH.float() - expected_NH).norm() / expected_NH.norm()
        assert error < 2**-8  # rounding to bfloat16


def test_rows_predict_the_supervised_tokens(
    build: Callable[..., TeacherEngine], teacher_folder: Path
) -> None:
    """The stored row's argmax is the model's prediction of that token: no off-by-one."""
    engine = build(tokens=64)
    (states_NH,) = engine.hidden_states(sequences()[2:3])
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    sequence = sequences()[2]
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(sequence.ids_T).long()[None]).logits[0, :, :VOCABULARY]
        rebuilt_NV = model.lm_head(states_NH.float())[:, :VOCABULARY]
    expected_N = logits_TV.argmax(-1)[sequence.target_positions_N - 1]
    assert (rebuilt_NV.argmax(-1) == expected_N).float().mean() > 0.95


def test_a_sequence_beyond_the_context_is_refused(build: Callable[..., TeacherEngine]) -> None:
    engine = build(tokens=64, max_length=63)
    with pytest.raises(ModelError, match="a sequence has 64 tokens, the teacher's context is 63"):
        list(engine.hidden_states(sequences()))


def test_close_twice_and_use_after_close(build: Callable[..., TeacherEngine]) -> None:
    engine = build(tokens=64)
    engine.close()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        list(engine.hidden_states(sequences()))


def test_no_sequences_no_states(build: Callable[..., TeacherEngine]) -> None:
    assert list(build(tokens=64).hidden_states([])) == []
