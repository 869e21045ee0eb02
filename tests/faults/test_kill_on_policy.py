"""An on-policy run whose processes are killed at random goes on with the round it was in, and ends
in the very weights of a run that nobody has killed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from configs.load import load_run
from storage.store import ArtifactStore
from tasks.presentation.tracking import read_metrics
from tasks.stages.planning import plan_stages, round_identities
from tests.command import kdflow
from tests.prefect_server import Server, start_server
from tests.processes import is_rank, orphaned_ranks
from tests.readme import ROOT

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]
ROUNDS, STEPS = 10, 4
PAUSE_S = {"transformers": 5.0, "sglang": 12.0}  # a kill comes in any of the start or the rounds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("checkout"), migrated)
    yield running
    running.stop()


def start(server: Server, recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "run", str(recipe)],
        env=server.env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def victims(flow: psutil.Process, kind: str) -> list[psutil.Process]:
    """The processes of a kind that this run has now; of an engine, those of SGLang too."""
    if kind == "flow":
        return [flow]
    hosts = [child for child in flow.children(recursive=True) if is_rank(child, kind)]
    own = [child for host in hosts for child in host.children(recursive=True)]
    return [p for p in (*hosts, *own) if "resource_tracker" not in " ".join(p.cmdline())]


def kill_while_running(
    process: subprocess.Popen[str], kinds: list[str], rng: random.Random, pause_s: float
) -> list[str]:
    """Kill one of each kind in turn, at random moments; those that were left when it ended."""
    flow, left = psutil.Process(process.pid), list(kinds)
    while left:
        deadline = time.monotonic() + rng.uniform(0, pause_s)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is not None:
            return left
        try:
            found = victims(flow, left[0])
            if found:
                os.kill(rng.choice(found).pid, signal.SIGKILL)
                if left.pop(0) == "flow":
                    return left
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return left


def survive(server: Server, recipe: Path, kinds: list[str], rng: random.Random) -> None:
    """Start the run again until it ends well."""
    policy = load_run(str(recipe)).on_policy
    assert policy is not None
    pause_s = PAUSE_S[policy.rollout.type]
    left, output = kinds, ""
    for _ in range(2 * len(kinds) + 2):
        with start(server, recipe) as process:
            left = kill_while_running(process, left, rng, pause_s)
            output, _ = process.communicate(timeout=300)
        assert not orphans(recipe), "a killed run has left processes behind"
        if process.returncode == 0 and not left:
            return
        assert process.returncode != 0, f"the run ended before {left} could be killed"
    raise AssertionError(output)


def orphans(recipe: Path) -> list[psutil.Process]:
    """Processes of runs of this test that are still there a moment later."""
    deadline = time.monotonic() + 20
    while True:
        found = orphaned_ranks()
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def write_recipe(
    make_recipe: Callable[..., Path], folder: Path, rollout: dict[str, object]
) -> Path:
    recipe = yaml.safe_load(
        make_recipe(max_steps=None, num_ranks=2, checkpoint_every=1).read_text()
    )
    recipe |= {
        "mode": "onpolicy",
        "loss": {"divergence": {"type": "reverse_kl"}, "kd_ratio": 1.0, "logits_memory_mb": 1},
        "on_policy": {
            "rounds": ROUNDS,
            "prompts_per_round": 8 * STEPS,
            "max_new_tokens": 40,
            "heldout_sequences": 8,
            "rollout": {"dtype": "float32"} | rollout,
        },
    }
    recipe["storage"] |= {"root": str(folder / "store"), "scratch": str(folder / "scratch")}
    folder.mkdir()
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def both_recipes(
    make_recipe: Callable[..., Path], folder: Path, rollout: dict[str, object]
) -> tuple[Path, Path]:
    """The same run twice, with stores of their own."""
    whole, killed = (
        write_recipe(make_recipe, folder / name, rollout) for name in ("whole", "killed")
    )
    return whole, killed


def student_folder_of(recipe: Path) -> Path:
    """Where the trained student is; all rounds are there, each step once."""
    run = load_run(str(recipe))
    train = plan_stages(run)["train"]
    store = ArtifactStore(root=run.storage.root, scratch=run.storage.scratch)
    rounds = round_identities(train, run).values()
    assert all(store.find(i.kind, i.digest) for i in rounds)
    for kind, count in (("rollouts", ROUNDS), ("round", ROUNDS), ("student", 1)):
        assert len(list((Path(run.storage.root) / "artifacts" / kind).iterdir())) == count
    ref = store.find("student", train.digest)
    assert ref is not None
    assert ref.counts == {"steps": ROUNDS * STEPS, "rounds": ROUNDS}
    records = read_metrics(Path(ref.uri) / "metrics.jsonl")
    assert [(r["step"], r["round"]) for r in records] == [
        (step, 1 + (step - 1) // STEPS) for step in range(1, ROUNDS * STEPS + 1)
    ]
    return Path(ref.uri)


def end_in_the_same_weights(
    server: Server,
    recipes: tuple[Path, Path],
    kinds: list[str],
    rng: random.Random,
) -> None:
    """The first recipe's run is left alone, the second's killed; bit for bit they are the same."""
    whole, killed = recipes
    kdflow("run", str(whole))
    survive(server, killed, kinds, rng)
    one, other = student_folder_of(whole), student_folder_of(killed)
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    losses = [[r["loss"] for r in read_metrics(f / "metrics.jsonl")] for f in (one, other)]
    assert losses[0] == losses[1]


# In every run of CI: killed engines and trainers, and rounds that stay done, in test_on_policy; a
# whole run that is killed in test_interrupt.
@pytest.mark.slow
def test_killed_rounds_end_in_the_same_weights(
    server: Server, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Each kind of process once, with transformers as the engine."""
    recipes = both_recipes(make_recipe, tmp_path, {"type": "transformers"})
    end_in_the_same_weights(server, recipes, ["rollout", "trainer", "flow"], random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_with_sglang(
    server: Server, make_recipe: Callable[..., Path], tmp_path: Path, seed: int
) -> None:
    """Five kills a seed, of any process of the kind: the engine's are its scheduler's, too."""
    rng = random.Random(seed)
    kinds = ["rollout", "trainer", "flow", *rng.sample(["rollout", "trainer", "flow"], 2)]
    recipes = both_recipes(make_recipe, tmp_path, {"type": "sglang", "max_running": 8})
    end_in_the_same_weights(server, recipes, kinds, rng)
