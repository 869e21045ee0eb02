"""Whether the machines of a Ray cluster are what a run needs: asked before anything is computed."""

import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from configs.schema.workers import RayWorkers
from kdflow_core.workers.ray_launcher import nodes_of
from kdflow_core.workers.ray_orders import Node, bundle_of, lacks_room, nodes_for, room_for
from kdflow_core.workers.ray_relay import unlike_here
from tasks.stages.catalogue import CATALOGUE, devices_of
from tasks.stages.identity import StageIdentity, made_of, open_store

CLOCK_S = 30.0  # leases go by the clock


def check_cluster(
    run: RunConfig, stages: Iterable[StageIdentity], folders: Mapping[str, Path]
) -> None:
    """Refuse a cluster whose nodes lack what the ranks of these stages need, with the models in
    these `folders`. Raises ConfigError, ModelError and WorkerError.
    """
    assert isinstance(run.workers, RayWorkers)
    with _marks(run) as marks:
        places = _places(run) | marks
        nodes = nodes_of(run.workers, tuple(places))
    problems = [text for node in nodes for text in _problems(node, run.workers)]
    problems += [text for node in nodes for text in _unseen(node, places)]
    problems += _too_many(run, nodes, stages)
    if problems:
        raise ConfigError("workers.type=ray: " + "; ".join(problems))
    from tasks.checks.device_check import check_without_gpus  # noqa: PLC0415 - loads torch
    from tasks.checks.room_check import GB, Machine, check_room_on  # noqa: PLC0415 - loads torch

    on_gpus = run.workers.gpus_per_rank != 0
    machines = [
        Machine(
            name=f"node {node.address}",
            host=int(node.memory_gb * GB),
            gpus=len(node.gpus) if on_gpus else 0,
            gpu=int(node.gpu_memory_gb * GB),
        )
        for node in nodes
    ]
    if not any(machine.gpus for machine in machines):
        check_without_gpus(run, "the ranks of this cluster have")
    check_room_on(machines, run, folders)


def examined_nodes(config: RayWorkers) -> list[tuple[Node, list[str]]]:
    """The nodes of a cluster, and what is amiss with each, whatever the run. Raises WorkerError."""
    return [(node, _problems(node, config)) for node in nodes_of(config)]


def nodes_by_stage(run: RunConfig, stages: Iterable[StageIdentity]) -> dict[str, str]:
    """On how many of a cluster's nodes the ranks of each stage come to stand, for people; nothing
    where ranks are on this machine. Raises WorkerError.
    """
    if not isinstance(run.workers, RayWorkers):
        return {}
    config, nodes = run.workers, [node.resources for node in nodes_of(run.workers)]
    told = {}
    for identity in stages:
        ranks = CATALOGUE[identity.stage].ranks(run)
        devices = devices_of(run, identity.stage)
        bundle = bundle_of(config.cpus_per_rank, config.gpus_per_rank, devices, nodes)
        used = nodes_for(bundle, ranks, nodes, config.strategy)
        told[identity.name] = f"{ranks} ranks on {used} of {len(nodes)} nodes"
    return told


def _problems(node: Node, config: RayWorkers) -> list[str]:
    found = []
    if unlike := unlike_here(node.address, node.versions):
        found.append(unlike)
    if config.require_token and not node.token:
        found.append(
            f"node {node.address} was started without RAY_AUTH_MODE=token; start it with that, or "
            "set workers.require_token=false"
        )
    late_s = abs(node.clock - time.time())
    if late_s > CLOCK_S:
        found.append(f"the clock of node {node.address} is {late_s:,.0f} s off; set it")
    return found


@contextmanager
def _marks(run: RunConfig) -> Iterator[dict[str, str]]:
    """A new file in each folder that ranks write to, which whoever shares the folder sees; with the
    field that the folder is of.
    """
    store = open_store(run)
    folders = {"storage.scratch": store.scratch}
    if store.is_local:
        folders["storage.root"] = Path(store.root)
    marks = {folder / f".kdflow-{uuid.uuid4().hex}": field for field, folder in folders.items()}
    try:
        for path in marks:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        yield {str(path): f"{field}={path.parent}" for path, field in marks.items()}
    finally:
        for path in marks:
            path.unlink(missing_ok=True)


def _places(run: RunConfig) -> dict[str, str]:
    """What of this machine ranks read, with what it is: models and data, where they are local, and
    the folder that relative paths start at.
    """
    named = {f"{side}.model.path": made_of(run, side).path for side in ("teacher", "student")}
    for number, source in enumerate(run.data.sources):
        named[f"data.sources.{number}.path"] = source.path
    places = {os.getcwd(): f"the current folder {os.getcwd()}"}
    for field, path in named.items():
        if path is not None and Path(path).exists():
            places[path] = f"{field}={path}"
    return places


def _unseen(node: Node, places: Mapping[str, str]) -> list[str]:
    return [
        f"node {node.address} does not see {what}; all nodes must share it under one name (or, of "
        "the store and data, by a URL)"
        for path, what in places.items()
        if path not in node.seen
    ]


def _too_many(run: RunConfig, nodes: Sequence[Node], stages: Iterable[StageIdentity]) -> list[str]:
    assert isinstance(run.workers, RayWorkers)
    cpus, gpus = run.workers.cpus_per_rank, run.workers.gpus_per_rank
    resources, found = [node.resources for node in nodes], []
    for identity in stages:
        groups = {"ranks": (CATALOGUE[identity.stage].ranks(run), devices_of(run, identity.stage))}
        if run.on_policy is not None and identity.stage == "train":
            width = run.on_policy.rollout.ranks_per_replica
            if not run.engines_beside_student:
                groups["rollout engines"] = (run.rollout_engines(0), width)
            found += _uneven(run, nodes, width)
        bundles = {
            name: (bundle_of(cpus, gpus, devices, resources), ranks)
            for name, (ranks, devices) in groups.items()
        }
        if lacks_room(list(bundles.values()), resources):
            wanted = " and ".join(f"{ranks} {name}" for name, (_, ranks) in bundles.items())
            rooms = " or ".join(
                f"{room_for(bundle, resources)} of {cpus} CPUs and {bundle.get('GPU', 0)} GPUs each"
                for bundle, _ in bundles.values()
            )
            found.append(
                f"stage {identity.name} has {wanted}, and the {len(nodes)} nodes have room for "
                f"{rooms}"
            )
    return found


def _uneven(run: RunConfig, nodes: Sequence[Node], width: int) -> list[str]:
    """What is said where ranks that train may come to stand so that engines of so many GPUs, all of
    one node, do not fit onto theirs.
    """
    if not run.engines_beside_student or width == 1:
        return []
    odd = [node for node in nodes if int(node.resources.get("GPU", 0)) % width]
    if run.student.num_ranks % width == 0 and not odd:
        return []
    where = ", ".join(f"{n.address} has {n.resources.get('GPU', 0):g}" for n in odd)
    return [
        f"workers.placement=colocated with rollout engines of {width} GPUs of one node each needs "
        f"multiples of {width}: student.num_ranks={run.student.num_ranks}"
        + (f", and of GPUs node {where}" if odd else "")
    ]
