"""Whole runs: replay and live, kill and resume, rounds, refusals, an error in mid-step."""

import shutil
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kdflow_core.errors import ModelError, WorkerError
from kdflow_core.student.checkpoint import completed_steps
from kdflow_core.workers.base import Placement, RankContext, offered
from kdflow_core.workers.devices import join_group
from kdflow_core.workers.local import LocalLauncher
from tasks.checks.device_check import check_devices
from tasks.execution.launch import launch_stage
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.contracts.test_workers import Heard
from tests.faults.test_kill import kill_a_rank_after
from tests.gpu.place import LOG, Place, losses, through

ENDS_WITHIN_S = 30.0


def replay_and_live(place: Place) -> dict[str, Any]:
    """20 steps of some micro-batches each, plain, with adapters, and with recomputed activations:
    the loss falls, and a live teacher teaches what a stored one does.
    """
    figures: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"lora": {"rank": 8}, "lr": 1e-2},
        "checkpointing": {"activation_checkpointing": True},
    }
    for name, student in variants.items():
        found = losses(through(place.run("replay", student=student), until="train"))
        assert len(found) == 20
        assert found[-1] < found[0], (name, found)
        figures[name] = f"{found[0]:.3f} to {found[-1]:.3f}"
        if name == "plain":
            replayed = found
    live = losses(through(place.run("live", delivery="live"), until="train"))
    far = float(np.abs(np.array(live) / np.array(replayed) - 1).max())
    assert far < 0.02, far
    return figures | {"live against replay": f"{far:.1e}"}


def kill_and_resume(place: Place) -> dict[str, Any]:
    """A rank is killed behind a checkpoint; what goes on from it ends in the curve of the whole."""
    whole = losses(through(place.run("replay"), until="train"))
    shutil.copytree(place.folder / "replay", place.folder / "killed")
    shutil.rmtree(place.folder / "killed/artifacts/student")
    run = place.run("killed")
    done = through(run, until="extract")
    spec = stage_spec(plan_stages(run)["train"], run, done)
    checkpoints = place.folder / "killed-scratch/student" / spec.identity.digest / "checkpoints"
    killer = threading.Thread(target=kill_a_rank_after, args=(checkpoints, 5, 0))
    killer.start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        launch_stage(spec, LOG)
    killer.join()
    at = completed_steps(checkpoints)[-1]
    done["student"] = launch_stage(spec, LOG)
    far = float(np.abs(np.array(losses(done)) / np.array(whole) - 1).max())
    assert far < 0.02, far
    return {"resumed at step": at, "against the whole": f"{far:.1e}"}


def rounds(place: Place) -> dict[str, Any]:
    """Three rounds on one device, everything asleep while others work."""
    run = place.run(
        "rounds",
        mode="onpolicy",
        teacher={"sleep": True},
        student={"max_steps": None, "sleep": True, "global_batch_size": 8},
        loss={"divergence": {"type": "reverse_kl"}},
        on_policy={
            "rounds": 3,
            "prompts_per_round": 16,
            "max_new_tokens": 16,
            "heldout_sequences": 8,
            "rollout": {"type": "sglang", "sleep": place.on_gpu, "memory_fraction": 0.2},
        },
    )
    done = through(run, until="extract")
    figures: dict[str, Any] = {}
    with RoundsAtWork(stage_spec(plan_stages(run)["train"], run, done), LOG) as work:
        for number in range(1, run.on_policy.rounds + 1 if run.on_policy else 0):
            begin = time.perf_counter()
            work.roll_out(number)
            work.score(number)
            record = work.record(work.train(number))
            difference = record.log_prob_difference
            assert difference is not None
            mean = difference["mean"]
            assert mean < 0.1, difference  # the engine samples from these weights
            figures[f"round {number}"] = (
                f"{time.perf_counter() - begin:.1f} s, log p differs by {mean:.4f}"
            )
    return figures


def refusals(place: Place) -> dict[str, Any]:
    """What one GPU cannot do is refused before it starts."""
    gpus = torch.cuda.device_count()
    on_policy = {"rounds": 1, "prompts_per_round": 8, "rollout": {"type": "sglang"}}
    shared = {"type": "sglang", "weights": "broadcast"}
    cases: dict[str, dict[str, Any]] = {
        "ranks": {"student": {"num_ranks": gpus + 1}},
        "broadcast": {
            "mode": "onpolicy",
            "student": {"max_steps": None},
            "on_policy": on_policy | {"rollout": shared},
        },
    }
    for overrides in cases.values():
        with pytest.raises(ModelError):
            check_devices(place.run("refused", **overrides))
    return {"refused": ", ".join(cases)}


class FailingHost:
    """One rank fails while the other waits for it in a collective."""

    def __init__(self, context: RankContext, spec: str) -> None:
        del spec
        join_group(context)
        self._rank = context.rank

    @offered
    def work(self) -> None:
        """A step that one rank does not come through."""
        place = torch.device("cuda", self._rank) if torch.cuda.is_available() else "cpu"
        together = torch.ones(1, device=place)
        dist.all_reduce(together)
        if self._rank == 1:
            raise ValueError("an error in mid-step")
        dist.all_reduce(together)
        together.cpu()


def error_in_mid_step(_: Place) -> dict[str, Any]:
    """An error on one of two ranks ends both, with its own words. On GPUs it takes two."""
    begin = time.perf_counter()
    placement = Placement(name="failing", num_ranks=2)
    with (
        pytest.raises(WorkerError, match="an error in mid-step"),
        LocalLauncher().start("tests.gpu.runs:FailingHost", "", placement, Heard()) as group,
    ):
        group.call("work").replies()
    seconds = time.perf_counter() - begin
    assert seconds < ENDS_WITHIN_S, seconds
    return {"ended after": f"{seconds:.1f} s, process starts included"}
