"""What is said of a cluster's nodes before a run. Real ones on one machine are all alike, so these
are made up; `tests/integration/test_ray.py` asks real ones.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.load import load_run
from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from kdflow_core.workers.ray_orders import Node
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

    def of(*, sees: Callable[[str], bool] = lambda _: True, **other: Any) -> None:
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
                "resources": {"CPU": 4.0},
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
