"""A live teacher and a replayed one train the same student, however the ranks share the teacher."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from configs.load import load_run
from configs.schema.teacher import Teacher
from kdflow_core.batching import select_rows
from kdflow_core.contracts import TokenSequence
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_config
from kdflow_core.teacher.live import LiveStates
from kdflow_core.teacher.sglang import SglangTeacherEngine
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.presentation.tracking import read_metrics
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.conftest import VOCABULARY

pytestmark = pytest.mark.ranks
LOG = logging.getLogger("test")

# A sequence's states do not depend on the batch it is in.
TEACHER = {"type": "sglang", "dtype": "bfloat16", "tokens_per_batch": 512, "deterministic": True}


@pytest.fixture
def losses(make_recipe: Callable[..., Path], teacher_folder: Path) -> Callable[..., list[float]]:
    """The curve of a run in worker processes. Runs of one test share tokens and states, no student:
    some differ in nothing that identifies one.
    """

    def train(*, delivery: str, num_ranks: int = 1, **teacher: Any) -> list[float]:
        model = {"type": "pretrained", "path": str(teacher_folder)}
        config = {"model": model, "num_ranks": num_ranks} | TEACHER | teacher
        overrides = {"teacher": config, "delivery": delivery}
        run = load_run(str(make_recipe(max_steps=5, num_ranks=num_ranks)), overrides)
        done: dict[str, ArtifactRef] = {}
        for stage in ("tokenize", "extract", "train"):
            spec = StageSpec(identity=plan_stages(run)[stage], run=run, inputs=done)
            done = done | {spec.identity.output: launch_stage(spec, LOG)}
        student = Path(done["student"].uri)
        curve = [record["loss"] for record in read_metrics(student / "metrics.jsonl")]
        shutil.rmtree(student)
        return curve

    return train


@pytest.mark.timeout(1500)  # nine processes that import SGLang
def test_live_is_replay(losses: Callable[..., list[float]]) -> None:
    """To the last bit with one rank, two steps scored at a time and the teacher asleep in between;
    with ranks that have a teacher each, or share one, as far as sums of bfloat16 allow.
    """
    replayed = losses(delivery="replay")
    assert len(replayed) == 5
    assert replayed[-1] < replayed[0]
    assert losses(delivery="live", forward_batches=2, sleep=True) == replayed
    each_its_own = losses(delivery="live", num_ranks=2)
    np.testing.assert_allclose(each_its_own, replayed, rtol=1e-4)
    # The shards' partial sums are rounded to bfloat16 before they are added.
    shared = losses(delivery="live", num_ranks=2, tensor_parallel=2, forward_batches=3)
    np.testing.assert_allclose(shared, replayed, rtol=1e-2)


def test_states_reach_the_loss_by_reference(teacher_folder: Path) -> None:
    """What the source gives is the storage of the model's own output; one selection copies rows."""
    config = TypeAdapter(Teacher).validate_python(
        TEACHER
        | {"deterministic": False}
        | {"model": {"type": "pretrained", "path": str(teacher_folder)}}
    )
    engine = SglangTeacherEngine(
        config,
        folder=teacher_folder,
        head=load_head(teacher_folder, load_config(teacher_folder), VOCABULARY),
        longest=64,
        device=torch.device("cpu"),
    )
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            ids_T=rng.integers(0, 390, n).astype(np.int32), supervised_T=np.arange(n) >= n // 2
        )
        for n in (20, 30, 7)
    ]
    outputs: list[torch.Tensor] = []
    assert engine._runner is not None
    sglang_runner = engine._runner._runner
    forward = sglang_runner.forward

    def spy(batch: Any) -> Any:
        result = forward(batch)
        outputs.append(result.logits_output.hidden_states)
        return result

    sglang_runner.forward = spy
    states = LiveStates(
        engine=engine,
        hidden_size=48,
        sequences_of=lambda step, rank: sequences,
        rank=0,
        ranks=[0],
        num_steps=1,
        steps_at_once=1,
        sleep=False,
    )
    states.begin_step(0)
    (output_RH,) = outputs
    assert output_RH.shape == (57, 48)
    rows = [states.rows(s) for s in sequences]
    for part in rows:
        assert part.buffer_RH.data_ptr() == output_RH.data_ptr()
        assert part.buffer_RH.untyped_storage().data_ptr() == output_RH.untyped_storage().data_ptr()
    selected_NH = select_rows(rows, hidden_size=48, device=torch.device("cpu"))
    begin = 30  # longest first
    expected_NH = output_RH[begin + sequences[0].target_positions_N - 1]
    torch.testing.assert_close(selected_NH[: len(expected_NH)], expected_NH, rtol=0, atol=0)
    engine.close()
