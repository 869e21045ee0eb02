"""Runs on a Ray cluster of two nodes: the same results as on one machine, and accidents."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ConfigError
from configs.load import load_run
from configs.schema.run import RunConfig
from kdflow_core.errors import WorkerError
from storage.artifact import ArtifactRef
from tasks.checks.run_check import checked_plan
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline
from tests.processes import wait_until_gone
from tests.ray_cluster import RayCluster, running_cluster

pytestmark = pytest.mark.ranks

RANKS = {"num_ranks": 2, "micro_batch_tokens": 90}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def ray_run(
    make_recipe: Callable[..., Path],
    tmp_path: Path,
    cluster: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
):
    """Loads a run whose ranks are spread over the nodes, or are local, in a store of its own."""
    # Of one machine, two ranks have the threads that each has on its node: the last bits of a
    # product go by their number on some processors.
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * cores)

    def load(name: str, student: dict[str, Any], **more: Any) -> RunConfig:
        workers = {"type": "ray", "address": cluster.address, "strategy": "spread"}
        overrides = {
            "storage.root": str(tmp_path / f"store-{name}"),
            "storage.scratch": str(tmp_path / f"scratch-{name}"),
            "workers": workers if name.startswith("ray") else {"type": "local"},
        }
        return load_run(str(make_recipe(**RANKS, **student)), overrides | more)

    return load


Load = Callable[..., RunConfig]
Accident = Callable[[RayCluster, psutil.Process], None]


def weights_of(done: dict[str, ArtifactRef]) -> dict[str, torch.Tensor]:
    return load_file(Path(done["student"].uri) / "model/model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("delivery", ["replay", pytest.param("live", marks=pytest.mark.slow)])
def test_a_run_over_two_nodes_is_that_on_one_machine(ray_run: Load, delivery: str) -> None:
    """To the last bit, with ranks of extraction and training on both nodes."""
    results = []
    for name in ("local", "ray"):
        run = ray_run(name, {}, delivery=delivery, **{"teacher.num_ranks": 2})
        checked_plan(run, download=False)
        done = run_inline(run, until="train", launched={"tokenize", "extract", "train"})
        results.append(weights_of(done))
    assert_equal(*results)


SGLANG = {"type": "sglang", "dtype": "float32", "max_running": 16, "num_engines": 2}
TRANSFORMERS = {"type": "transformers", "dtype": "float32", "prompts_per_batch": 8}
ROUNDS = {
    "rounds": 2,
    "prompts_per_round": 16,
    "max_new_tokens": 8,
    "heldout_sequences": 8,
}


@pytest.mark.parametrize(
    ("placement", "rollout"),
    [
        pytest.param("separate", TRANSFORMERS | {"num_engines": 2}, marks=pytest.mark.slow),
        ("colocated", TRANSFORMERS),
        # Four starts of SGLang each.
        pytest.param("separate", SGLANG | {"weights": "broadcast"}, marks=pytest.mark.slow),
        pytest.param("colocated", SGLANG, marks=pytest.mark.slow),
    ],
)
def test_rounds_over_two_nodes_are_those_on_one_machine(
    ray_run: Load, placement: str, rollout: dict[str, Any]
) -> None:
    """Two ranks that train and two engines, of each one on either node: with room of their own, or
    on the devices of those that train.
    """
    results = []
    for name in ("local", "ray"):
        more = {"workers.placement": placement} if name == "ray" else {}
        rounds = ROUNDS | {"rollout": rollout | {"bucket_mb": 1}}
        run = ray_run(name, {"max_steps": None}, mode="onpolicy", on_policy=rounds, **more)
        checked_plan(run, download=False)
        done = run_inline(run, until="extract")
        spec = stage_spec(plan_stages(run)["train"], run, done)
        with RoundsAtWork(spec, logging.getLogger("test")) as work:
            for number in (1, 2):
                work.roll_out(number)
                work.score(number)
                work.train(number)
            results.append(weights_of({"student": work.export()}))
    assert_equal(*results)


def kill_rank(_: RayCluster, rank: psutil.Process) -> None:
    os.kill(rank.pid, signal.SIGKILL)


def kill_relay(_: RayCluster, rank: psutil.Process) -> None:
    parent = rank.parent()
    assert parent is not None
    os.kill(parent.pid, signal.SIGKILL)


def kill_bridge(_: RayCluster, rank: psutil.Process) -> None:
    del rank
    for process in psutil.Process().children():
        if "kdflow_core.workers.ray_bridge" in process.cmdline():
            process.kill()


def stop_relay(_: RayCluster, rank: psutil.Process) -> None:
    """As where a machine is cut off."""
    parent = rank.parent()
    assert parent is not None
    parent.suspend()


@pytest.mark.slow  # the contract has deaths of ranks and launchers on a cluster, too: test_workers
@pytest.mark.parametrize("accident", [kill_rank, kill_relay, kill_bridge, stop_relay])
def test_whatever_dies_ends_the_group_and_the_next_attempt_goes_on(
    ray_run: Load,
    cluster: RayCluster,
    accident: Accident,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdflow_core.workers.group.SILENT_S", 6.0)
    ends_and_goes_on(ray_run, cluster, accident, steps=6)


def ends_and_goes_on(
    ray_run: Load,
    cluster: RayCluster,
    accident: Accident,
    *,
    steps: int,
    tolerance: float = 0.0,
) -> None:
    student = {"max_steps": steps}
    expected = run_inline(ray_run("local", student), until="train", launched={"train"})
    run = ray_run("ray", student)
    run_inline(run, until="extract")
    seen: list[int] = []

    def strike() -> None:
        wait_for_a_checkpoint(run)
        ranks = cluster.ranks()
        seen.extend(rank.pid for rank in ranks)
        accident(cluster, ranks[-1])

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    with pytest.raises(WorkerError, match=r"of stage train.*(ended by|is lost|last heard of)"):
        run_inline(run, until="train", launched={"train"})
    thread.join()
    assert len(seen) == 2
    wait_until_gone(seen)
    found = weights_of(run_inline(run, until="train", launched={"train"}))
    torch.testing.assert_close(found, weights_of(expected), rtol=tolerance, atol=tolerance)


def wait_for_a_checkpoint(run: RunConfig) -> None:
    checkpoints = Path(run.storage.scratch).absolute() / "student"
    while not list(checkpoints.glob("*/checkpoints/step-*/*.distcp")):
        time.sleep(0.02)


@pytest.mark.slow
def test_training_goes_on_with_other_ranks_on_other_nodes(
    ray_run: Load, cluster: RayCluster
) -> None:
    """Two ranks on two nodes, then three on as few as hold them, where one machine alone ends."""
    expected = weights_of(run_inline(ray_run("local", {}), until="train", launched={"train"}))
    run = ray_run("ray", {})
    run_inline(run, until="extract")

    def strike() -> None:
        wait_for_a_checkpoint(run)
        kill_rank(cluster, cluster.ranks()[0])

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        run_inline(run, until="train", launched={"train"})
    thread.join()
    more = {"student.num_ranks": 3, "workers.strategy": "pack"}
    found = weights_of(run_inline(ray_run("ray", {}, **more), until="train", launched={"train"}))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("overrides", "variables", "message"),
    [
        ({"student.num_ranks": 9, "student.global_batch_size": 9}, {}, "9 ranks, and the 2 nodes"),
        ({"workers.cpus_per_rank": 5}, {}, "have room for 0 of 5 CPUs"),
        ({}, {"RAY_AUTH_MODE": ""}, "RAY_AUTH_MODE=token is not set"),
        ({"workers.address": "127.0.0.2:9"}, {}, "workers.address=127.0.0.2:9 is not reached"),
        pytest.param({}, {"RAY_AUTH_TOKEN": "0" * 64}, "Ray: ", marks=pytest.mark.slow),
    ],
)
def test_what_a_cluster_lacks_is_said_before_the_run(
    ray_run: Load,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    variables: dict[str, str],
    message: str,
) -> None:
    run = ray_run("ray", {}, **overrides)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, WorkerError), match=message):
        checked_plan(run, download=False)


def kill_raylet(cluster: RayCluster, rank: psutil.Process) -> None:
    """Of the node that has no head."""
    del rank
    os.kill(cluster.raylets["second"], signal.SIGKILL)


@pytest.mark.slow
def test_a_node_that_is_gone_ends_the_group_and_the_other_one_goes_on(ray_run: Load) -> None:
    """In a cluster of its own, which then has one node. It is found out after about 15 seconds. Two
    ranks share the threads of that node then, and by their number sums are rounded.
    """
    with running_cluster() as cluster:
        address = {"workers.address": cluster.address}

        def load(name: str, student: dict[str, Any]) -> RunConfig:
            return ray_run(name, student, **(address if name == "ray" else {}))

        ends_and_goes_on(load, cluster, kill_raylet, steps=500, tolerance=1e-3)
