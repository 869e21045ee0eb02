"""What is said of a cluster's nodes before a run. Real ones on one machine are all alike, so these
are made up; `tests/integration/test_ray.py` asks real ones.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from kdflow_core.workers.ray_orders import Node, nodes_for
from kdflow_core.workers.ray_relay import versions
from tasks.checks.cluster_check import check_cluster
from tasks.forecast.memory import least_training
from tasks.stages.planning import plan_stages


@pytest.fixture
def run(make_recipe: Callable[..., Path]) -> RunConfig:
    workers = {"type": "ray", "cpus_per_rank": 2}
    return load_run(str(make_recipe(num_ranks=3)), {"workers": workers})


@pytest.fixture
def check(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks a cluster of two nodes, of which the second is otherwise."""

    def of(
        run: RunConfig = run,
        *,
        sees: Callable[[str], bool] = lambda _: True,
        first: dict[str, float] | None = None,
        **other: Any,
    ) -> None:
        def nodes_of(_: object, paths: tuple[str, ...]) -> tuple[Node, ...]:
            alike: dict[str, Any] = {
                "host": "a",
                "versions": versions(),
                "cores": 4,
                "memory_gb": 8.0,
                "gpus": (),
                "gpu_memory_gb": 0.0,
                "clock": time.time(),
                "token": True,
                "resources": first or {"CPU": 4.0},
            }
            seen = tuple(path for path in paths if sees(path))
            return (
                Node(address="10.0.0.1", seen=paths, **alike),
                Node(address="10.0.0.2", seen=seen, **alike | other),
            )

        monkeypatch.setattr("tasks.checks.cluster_check.nodes_of", nodes_of)
        models = {"teacher": run.teacher.model, "student": run.student.model}
        folders = {n: Path(m.path) for n, m in models.items() if isinstance(m, PretrainedModel)}
        check_cluster(run, plan_stages(run).values(), folders)

    return of


def test_nodes_that_are_alike_and_leave_nothing_behind(
    check: Callable[..., None], run: RunConfig
) -> None:
    check()
    places = (Path(run.storage.root), Path(run.storage.scratch))
    assert [file for place in places for file in place.glob(".kdflow-*")] == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"versions": versions() | {"torch": "1.0"}}, r"node 10\.0\.0\.2 has torch 1\.0 \(here 2"),
        ({"token": False}, r"node 10\.0\.0\.2 was started without RAY_AUTH_MODE=token"),
        ({"clock": 0.0}, r"the clock of node 10\.0\.0\.2 is [\d,]+ s off"),
        ({"resources": {"CPU": 1.0}}, r"stage train has 3 ranks, and the 2 nodes have room for 2"),
    ],
)
def test_a_node_that_is_otherwise(
    check: Callable[..., None], other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**other)


def rounds(recipe: Path, rollout: dict[str, Any], **workers: Any) -> RunConfig:
    """An on-policy run of four ranks over two nodes."""
    section = {"rounds": 1, "prompts_per_round": 8, "rollout": {"type": "sglang"} | rollout}
    return load_run(
        str(recipe),
        {
            "mode": "onpolicy",
            "student.num_ranks": 4,
            "student.max_steps": None,
            "workers": {"type": "ray"} | workers,
            "on_policy": section,
        },
    )


def test_engines_have_room_beside_the_ranks_that_train(
    check: Callable[..., None], make_recipe: Callable[..., Path]
) -> None:
    """Both are there at a time, however much either would find alone."""
    gpus = {"CPU": 32.0, "GPU": 4.0}
    run = rounds(make_recipe(), {"tensor_parallel": 2, "num_engines": 2})
    check(run, resources=gpus, first=gpus)
    wider = rounds(make_recipe(), {"tensor_parallel": 2, "num_engines": 3})
    with pytest.raises(ConfigError, match=r"stage train has 4 ranks and 3 rollout engines, and"):
        check(wider, resources=gpus, first=gpus)
    odd = gpus | {"GPU": 3.0}  # six in all, of which one each is left for an engine of two
    with pytest.raises(ConfigError, match="4 ranks and 2 rollout engines"):
        check(run, resources=odd, first=odd)


def test_engines_on_the_devices_of_those_that_train(
    check: Callable[..., None], make_recipe: Callable[..., Path]
) -> None:
    gpus = {"CPU": 32.0, "GPU": 2.0}
    run = rounds(make_recipe(), {"tensor_parallel": 2}, placement="colocated")
    assert run.rollout_engines(0) == 2
    check(run, resources=gpus, first=gpus)
    odd = gpus | {"GPU": 3.0}
    with pytest.raises(ConfigError, match=r"multiples of 2: .*GPUs node 10\.0\.0\.2 has 3"):
        check(run, resources=odd, first=gpus)


@pytest.mark.parametrize(
    ("strategy", "count", "expected"),
    [("pack", 4, 1), ("pack", 6, 2), ("pack", 7, 3), ("pack", 99, 4), ("spread", 2, 2),
     ("spread", 7, 3)],
)  # fmt: skip
def test_on_how_many_nodes_ranks_come_to_stand(
    strategy: Literal["pack", "spread"], count: int, expected: int
) -> None:
    """Of nodes with room for 2, 1 and 4 of them, and one that has none."""
    nodes = [{"CPU": 9.0, "GPU": gpus} for gpus in (2.0, 1.0, 4.0)] + [{"CPU": 9.0}]
    assert nodes_for({"CPU": 1, "GPU": 1}, count, nodes, strategy) == expected


def test_what_engines_do_on_gpus_alone(
    check: Callable[..., None], make_recipe: Callable[..., Path]
) -> None:
    run = rounds(make_recipe(), {"sleep": True})
    with pytest.raises(ModelError, match=r"rollout\.sleep=true .* ranks of this cluster have none"):
        check(run, resources={"CPU": 8.0}, first={"CPU": 8.0})


def test_nodes_without_room_for_the_student(
    check: Callable[..., None], run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks, which take a third of it each; GPUs hold one each."""
    assert isinstance(run.student.model, PretrainedModel)
    folder = Path(run.student.model.path)
    size = sum(least_training(run, folder, None, on_gpu=True).values())
    monkeypatch.setattr("tasks.checks.room_check.GB", 1)

    def nodes(each: int, **other: Any) -> None:
        check(memory_gb=float(each), resources={"CPU": 8.0, "GPU": 8.0}, **other)

    small = r"training \(student\.num_ranks=3\) takes .* on each rank"
    with pytest.raises(ModelError, match=small + r".*node 10\.0\.0\.1 has .*node 10\.0\.0\.2 has "):
        nodes(3 * size - 1)
    nodes(3 * size)
    gpus = {"gpus": ("a", "b", "c"), "gpu_memory_gb": float(size)}
    nodes(3 * size, **gpus)
    with pytest.raises(ModelError, match=small):
        nodes(30 * size, **gpus | {"gpus": ("a", "b")})
    with pytest.raises(ModelError, match=small):
        nodes(3 * size, **gpus | {"gpu_memory_gb": float(size - 1)})


@pytest.mark.parametrize(
    "field",
    ["storage.root", "storage.scratch", "teacher.model.path", "data.sources.0.path", "folder"],
)
def test_a_node_that_does_not_see_what_ranks_read_or_write(
    check: Callable[..., None], run: RunConfig, field: str
) -> None:
    hidden = {
        "storage.root": run.storage.root,
        "storage.scratch": run.storage.scratch,
        "teacher.model.path": run.teacher.model.path,  # type: ignore[union-attr]
        "data.sources.0.path": run.data.sources[0].path,
        "folder": str(Path.cwd()),
    }[field]
    own = {hidden} if "path" in field or field == "folder" else set()

    def sees(path: str) -> bool:
        return path not in own and (own != set() or str(Path(path).parent) != hidden)

    with pytest.raises(ConfigError, match=rf"10\.0\.0\.2 does not see .*{field}.*; all nodes must"):
        check(sees=sees)
