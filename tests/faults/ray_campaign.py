"""Accidents at random on a Ray cluster: `python -m tests.faults.ray_campaign --accidents 10`.

A run of two ranks on two nodes, off-policy or on-policy, to which something happens at a random
moment: a rank, its actor, the second node's raylet or the flow is killed, or a rank is stopped.
Then it is run again until it ends. It must end in what an undisturbed run on such a cluster ends
in, and leave no rank on either node. Everything follows from the seed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load

from tests.faults.campaign import Attempt, Place, Tally, World, report
from tests.ray_cluster import RayCluster, running_cluster

ATTEMPTS = 3
GONE_WITHIN_S = 10.0
ROUNDING = 1e-4  # of weights, after some dozen steps
Result = tuple[bytes, object] | None
Accident = Callable[[RayCluster, Attempt, psutil.Process], None]


def kill_rank(_: RayCluster, __: Attempt, rank: psutil.Process) -> None:
    rank.kill()


def kill_actor(_: RayCluster, __: Attempt, rank: psutil.Process) -> None:
    actor = rank.parent()
    assert actor is not None
    actor.kill()


def kill_raylet(cluster: RayCluster, _: Attempt, __: psutil.Process) -> None:
    os.kill(cluster.raylets["second"], signal.SIGKILL)


def kill_flow(_: RayCluster, attempt: Attempt, __: psutil.Process) -> None:
    attempt.process.kill()


def stop_rank(_: RayCluster, __: Attempt, rank: psutil.Process) -> None:
    rank.suspend()


ACCIDENTS: list[Accident] = [kill_rank, kill_actor, kill_raylet, kill_flow, stop_rank]


def on_ray(place: Place, cluster: RayCluster) -> Place:
    """The same run, with two ranks on the cluster."""
    recipe = yaml.safe_load(place.recipe.read_text())
    recipe["workers"] = {"type": "ray", "address": cluster.address, "strategy": "spread"}
    recipe["student"] |= {"num_ranks": 2, "micro_batch_tokens": 90}
    if place.mode == "onpolicy":
        recipe["on_policy"]["rollout"] |= {"weights": "broadcast"}
    else:
        recipe["student"] |= {"max_steps": 40}
    place.recipe.write_text(yaml.safe_dump(recipe))
    return place


def left_on(cluster: RayCluster) -> list[psutil.Process]:
    """The ranks that are still there some seconds later."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (found := cluster.ranks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def strike(cluster: RayCluster, attempt: Attempt, accident: Accident, rng: random.Random) -> bool:
    """Once there are ranks, and then at a random moment. Whether there was one to strike."""
    while not cluster.ranks():
        if attempt.process.poll() is not None:
            return False
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 12))
    ranks = cluster.ranks()
    while not ranks and attempt.process.poll() is None:  # between two stages
        time.sleep(0.02)
        ranks = cluster.ranks()
    if not ranks or attempt.process.poll() is not None:
        return False
    accident(cluster, attempt, rng.choice(ranks))
    return True


def one_accident(world: World, expected: Result, tally: Tally, seed: int, mode: str) -> None:
    rng = random.Random(seed)
    accident = ACCIDENTS[seed % len(ACCIDENTS)]
    label = f"seed={seed} {mode} {accident.__name__}"
    with running_cluster() as cluster:
        place = on_ray(world.place(mode, f"ray-{mode}-{seed}"), cluster)
        attempt = place.start()
        if strike(cluster, attempt, accident, rng):
            tally.kills[f"{mode} {accident.__name__}"] += 1
        began = time.monotonic()
        code, output = attempt.finish()
        ended_s = time.monotonic() - began
        if found := left_on(cluster):
            tally.fail(f"{label}: left {found}")
    attempts = 1
    while code != 0 and attempts < ATTEMPTS:
        with running_cluster() as cluster:
            code, output = on_ray(place, cluster).start().finish()
        attempts += 1
    same = alike(place.result(), expected, exactly=accident is not kill_raylet)
    print(f"{label}: over after {ended_s:.0f} s, {attempts} runs, same result {same}", flush=True)
    tally.outcomes[accident.__name__, "same result" if code == 0 and same else "OTHER"] += 1
    if code != 0 or not same:
        tally.fail(f"{label}: exit code {code}, same result {same}\n{output}")


def alike(found: Result, expected: Result, *, exactly: bool) -> bool:
    """Where a node is gone, both ranks are on the other one, with half of its threads each: the
    last bits of a product go by their number on some processors.
    """
    if exactly or found is None or expected is None:
        return found == expected
    ours, theirs = load(found[0]), load(expected[0])
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=0, atol=ROUNDING) for name in ours
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accidents", type=int, default=10)
    parser.add_argument("--mode", choices=["offpolicy", "onpolicy"], default="offpolicy")
    parser.add_argument("--seed", type=int, default=0, help="of the first accident")
    options = parser.parse_args(arguments)
    world, tally = World(Path(tempfile.mkdtemp(prefix="ray-campaign-"))), Tally()
    with running_cluster() as cluster:
        undisturbed = on_ray(world.place(options.mode, "undisturbed"), cluster)
        code, output = undisturbed.start().finish()
        assert code == 0, output
    for seed in range(options.seed, options.seed + options.accidents):
        one_accident(world, undisturbed.result(), tally, seed, options.mode)
    report(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
