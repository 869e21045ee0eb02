"""Whether the machines of a Ray cluster are what a run needs: asked before anything is computed."""

import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from configs.schema.workers import RayWorkers
from kdflow_core.workers.ray_launcher import nodes_of
from kdflow_core.workers.ray_orders import Node
from kdflow_core.workers.ray_relay import differences
from storage.store import ArtifactStore
from tasks.stages.catalogue import CATALOGUE, devices_of
from tasks.stages.identity import StageIdentity, open_store

CLOCK_S = 30.0  # leases go by the clock


def check_cluster(run: RunConfig, stages: Iterable[StageIdentity]) -> None:
    """Refuse a cluster whose nodes lack what the ranks of these stages need. Raises ConfigError and
    WorkerError.
    """
    assert isinstance(run.workers, RayWorkers)
    store = open_store(run)
    shared = [store.scratch, *([Path(store.root)] if store.is_local else [])]
    with _marks(shared) as marks:
        nodes = nodes_of(run.workers, marks)
    problems = [text for node in nodes for text in _problems(node, run.workers)]
    problems += [text for node in nodes for text in _unseen(node, marks, store)]
    problems += _too_many(run, nodes, stages)
    if problems:
        raise ConfigError("workers.type=ray: " + "; ".join(problems))


def examined_nodes(config: RayWorkers) -> list[tuple[Node, list[str]]]:
    """The nodes of a cluster, and what is amiss with each, whatever the run. Raises WorkerError."""
    return [(node, _problems(node, config)) for node in nodes_of(config)]


def _problems(node: Node, config: RayWorkers) -> list[str]:
    found = []
    if other := differences(node.versions):
        found.append(f"node {node.address} has {', '.join(other)}; install the same there")
    if config.require_token and not node.token:
        found.append(
            f"node {node.address} was started without RAY_AUTH_MODE=token; start it with that, or "
            "set workers.require_token=false"
        )
    late_s = abs(node.clock - time.time())
    if late_s > CLOCK_S:
        found.append(f"the clock of node {node.address} is {late_s:,.0f} s off; set it")
    return found


def room(nodes: Sequence[Node], cpus: int, gpus: int) -> int:
    """How many ranks with so many CPUs and GPUs an empty cluster holds."""
    fitting = 0
    for node in nodes:
        by_cpus = int(node.resources.get("CPU", 0) // cpus)
        by_gpus = int(node.resources.get("GPU", 0) // gpus) if gpus else by_cpus
        fitting += min(by_cpus, by_gpus)
    return fitting


@contextmanager
def _marks(folders: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """A new file in each folder, which whoever shares the folder sees."""
    paths = [folder / f".kdflow-{uuid.uuid4().hex}" for folder in folders]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        yield tuple(map(str, paths))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _unseen(node: Node, paths: Sequence[str], store: ArtifactStore) -> list[str]:
    found = []
    for path in paths:
        if path in node.seen:
            continue
        field, remedy = "storage.root", "or an fsspec URL"
        if Path(path).parent == store.scratch:
            field, remedy = "storage.scratch", "a network file system, say"
        found.append(
            f"node {node.address} does not see {field}={os.path.dirname(path)}; set it to a folder "
            f"that all nodes share under one name, {remedy}"
        )
    return found


def _too_many(run: RunConfig, nodes: Sequence[Node], stages: Iterable[StageIdentity]) -> list[str]:
    found = []
    for identity in stages:
        needed = {devices_of(run, identity.stage): CATALOGUE[identity.stage].ranks(run)}
        if run.on_policy is not None and identity.stage == "train":
            width = run.on_policy.rollout.ranks_per_replica
            needed[width] = needed.get(width, 0) + run.on_policy.rollout.num_engines
        for devices, ranks in needed.items():
            cpus, gpus = _size(run, nodes, devices)
            if ranks > (most := room(nodes, cpus, gpus)):
                found.append(
                    f"stage {identity.name} has {ranks} ranks, and the {len(nodes)} nodes have "
                    f"room for {most} of {cpus} CPUs and {gpus} GPUs each"
                )
    return found


def _size(run: RunConfig, nodes: Sequence[Node], devices: int) -> tuple[int, int]:
    """The CPUs and GPUs that are set aside for a rank."""
    assert isinstance(run.workers, RayWorkers)
    there = devices if any(node.resources.get("GPU") for node in nodes) else 0
    given = run.workers.gpus_per_rank
    return run.workers.cpus_per_rank, there if given is None else given
