"""Accidents at random, counted: `python -m tests.faults.campaign --kills 100 --corruptions 60`.

Kills: chains of runs, off-policy and on-policy, in which a process (the flow, a rank, the server
that ranks are forked from, or all at once) is killed at a random moment, many times in a row; then
the run is left alone. Corruptions: a finished or half-finished run, a file of it damaged, and the
run again. Everything follows from the seed; a row of the table names its own.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import yaml

from tests.conftest import make_llama, make_tokenizer
from tests.processes import FORK_SERVER, is_rank
from tests.readme import ROOT

TIMEOUT_S = 400
MARK = "KDFLOW_CAMPAIGN"
GONE_WITHIN_S = 5.0
VICTIMS = ("flow", "rank", "rank", "fork server", "all")
WAITED = "is computing this artifact; waiting for it"


@dataclass
class Tally:
    """What was seen."""

    kills: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)


class World:
    """Models, data and recipes in a folder; a reference run of each recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, hidden, layers, rows, seed in (
            ("teacher", 48, 3, 448, 1),
            ("student", 32, 2, 416, 2),
        ):
            make_tokenizer(folder / name, texts=list(topics.values()))
            make_llama(folder / name, hidden=hidden, layers=layers, rows=rows, seed=seed)
        rows = [
            {"prompt": f"{a} plus {b}?", "completion": f"It is {a + b}.", "answer": str(a + b)}
            for a in range(12)
            for b in range(10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "sums.jsonl").write_text(text)
        self.reference = {
            mode: self.place(mode, f"reference-{mode}") for mode in ("offpolicy", "onpolicy")
        }
        for place in self.reference.values():
            code, output = place.start().finish()
            assert code == 0, output

    def place(self, mode: str, name: str) -> "Place":
        """A run with a store of its own."""
        return Place(self, mode, self.folder / name)


class Place:
    """A run, its store, its scratch and its Prefect."""

    def __init__(self, world: World, mode: str, folder: Path) -> None:
        self.mode, self.folder = mode, folder
        folder.mkdir(exist_ok=True)
        recipe: dict[str, object] = {
            "name": "campaign",
            "data": {
                "sources": [{"type": "files", "path": str(world.folder / "sums.jsonl")}],
                "max_length": 128,
                "heldout_fraction": 0.2,
            },
            "teacher": {
                "type": "transformers",
                "model": {"type": "pretrained", "path": str(world.folder / "teacher")},
                "dtype": "float32",
                "tokens_per_batch": 256,
            },
            "student": {
                "model": {"type": "pretrained", "path": str(world.folder / "student")},
                "compute_dtype": "float32",
                "save_dtype": "float32",
                "lr": 0.003,
                "global_batch_size": 8,
                "micro_batch_tokens": 256,
                "checkpoint_every": 10,
            },
            "loss": {"logits_memory_mb": 1},
            "storage": {
                "root": str(folder / "store"),
                "scratch": str(folder / "scratch"),
                "shard_rows": 64,
                "chunk_rows": 32,
            },
            "eval": {"max_generations": 2, "max_new_tokens": 8},
        }
        if mode == "offpolicy":
            recipe["student"] |= {"max_steps": 120}  # type: ignore[operator]
        else:
            recipe |= {
                "mode": "onpolicy",
                "loss": {"divergence": {"type": "reverse_kl"}, "logits_memory_mb": 1},
                "on_policy": {
                    "rounds": 6,
                    "prompts_per_round": 16,
                    "max_new_tokens": 24,
                    "heldout_sequences": 8,
                    "rollout": {"type": "transformers", "dtype": "float32"},
                },
            }
        self.recipe = folder / "campaign.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))

    def start(self) -> "Attempt":
        return Attempt(self)

    def artifacts(self, kind: str) -> list[Path]:
        folder = self.folder / "store/artifacts" / kind
        found = folder.iterdir() if folder.is_dir() else iter(())
        return sorted(path for path in found if (path / "manifest.json").is_file())

    def finished(self) -> dict[str, int]:
        """What is finished, and when it was: manifests, and commits of shards."""
        root = self.folder / "store/artifacts"
        paths = [*root.glob("*/*/manifest.json"), *root.glob("states/*/commits/*.json")]
        return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in paths}

    def result(self) -> tuple[bytes, object] | None:
        """The student's weights and the scores; None where there are none."""
        students, evaluations = self.artifacts("student"), self.artifacts("evaluation")
        if len(students) != 1 or len(evaluations) != 1:
            return None
        weights = (students[0] / "model/model.safetensors").read_bytes()
        return weights, json.loads((evaluations[0] / "evaluation.json").read_text())["models"]


class Attempt:
    """`kdflow run`, once."""

    def __init__(self, place: Place, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.hung = False
        kept = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
        command = arguments or ("run", str(place.recipe))
        self._log = (place.folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows", *command],
            env=kept | {MARK: self.mark, "PREFECT_HOME": str(place.folder / "prefect")},
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")

    def finish(self) -> tuple[int | None, str]:
        """The exit code, None after a hang, and what was printed."""
        try:
            self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.hung = True
            self.kill("all")
            self.process.wait()
            return None, self.output()
        return self.process.returncode, self.output()

    def processes(self) -> Iterator[psutil.Process]:
        """All that carry this attempt's mark."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    yield process

    def victims(self, kind: str) -> list[psutil.Process]:
        """Those of a kind; none while there is none."""
        found = list(self.processes())
        if kind == "all":
            return found
        if kind == "flow":
            return [p for p in found if p.pid == self.process.pid]
        chosen = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                if is_rank(process) if kind == "rank" else FORK_SERVER in process.cmdline():
                    chosen.append(process)
        return chosen

    def kill(self, kind: str, rng: random.Random | None = None) -> bool:
        """Whether there was something to kill."""
        victims = self.victims(kind)
        if kind != "all" and rng is not None:
            victims = rng.sample(victims, min(1, len(victims)))
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                os.kill(victim.pid, signal.SIGKILL)
        return bool(victims)

    def left(self) -> list[str]:
        """Processes that are still there some seconds after the end."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (found := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [str(process) for process in found]


def chain_of_kills(world: World, tally: Tally, seed: int, kills: int) -> int:
    """One run, killed again and again until `kills` have been done; how many there were."""
    rng = random.Random(seed)
    mode = rng.choice(["offpolicy", "onpolicy"])
    place, done = world.place(mode, f"kills-{seed}"), 0
    label = f"kills seed={seed} {mode}"
    # Making a database takes longer than all the rest.
    shutil.copytree(world.reference[mode].folder / "prefect", place.folder / "prefect")
    while True:
        attempt, before = place.start(), place.finished()
        until = time.monotonic() + rng.uniform(3, 25)
        kind = rng.choice(VICTIMS)
        while done < kills and attempt.process.poll() is None:
            time.sleep(0.02)
            if time.monotonic() > until and attempt.kill(kind, rng):
                done += 1
                tally.kills[f"{mode} {kind}"] += 1
                kind, until = rng.choice(VICTIMS), time.monotonic() + rng.uniform(0, 12)
        code, output = attempt.finish()
        for what in complaints(place, attempt, before, output):
            tally.fail(f"{label}: {what}")
        if code is None or code == 0 or done >= kills:
            break
    if code != 0:
        code, output = place.start().finish()
    same = place.result() == world.reference[mode].result()
    tally.outcomes["kills", "same result" if code == 0 and same else "OTHER"] += 1
    if code != 0 or not same:
        tally.fail(f"{label}: exit code {code}, same result {same}\n{output}")
    else:
        shutil.rmtree(place.folder)
    return done


def complaints(
    place: Place, attempt: Attempt, before: dict[str, int], output: str
) -> Iterator[str]:
    """What must not be after a kill."""
    if attempt.hung:
        yield f"it hangs\n{output}"
    if WAITED in output:
        yield "a lease was waited for"
    if left := attempt.left():
        yield f"left {left}"
    after = place.finished()
    if lost := [name for name, when in before.items() if after.get(name) != when]:
        yield f"lost or made again: {lost}"


# What is done to a file.
def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"x")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flipped": _flip,
    "bytes swapped": lambda content, _: content[::-1],
    "cut": lambda content, rng: content[: rng.randrange(len(content) + 1) // 2],
    "empty": lambda _content, _rng: b"",
    "a list": lambda _content, _rng: b"[1, 2]",
    "null": lambda _content, _rng: b"null",
    "no text": lambda _content, rng: rng.randbytes(64),
}


def kind_of(path: Path) -> str:
    """A file's kind: what it is called, without digests and numbers."""
    words = [part for part in path.parts if not set(part) <= set("0123456789abcdef")]
    name = "".join(sign for sign in "/".join(words) if not sign.isdigit())
    return name if len(name) < 70 else f"...{name[-67:]}"


def half_done(world: World, name: str, rng: random.Random) -> Place:
    """A run in the middle: trained to a checkpoint, or ended and some of it taken away."""
    place = world.place("offpolicy", name)
    if rng.random() < 0.5:
        reference = world.reference["offpolicy"].folder
        for part in ("store", "scratch", "prefect"):
            shutil.copytree(reference / part, place.folder / part)
        for kind in rng.choice([[], ["report"], ["student", "evaluation", "report"]]):
            for path in place.artifacts(kind):
                shutil.rmtree(path)
        return place
    reference = world.reference["offpolicy"].folder
    shutil.copytree(reference / "prefect", place.folder / "prefect")
    attempt = place.start()
    checkpoints = place.folder / "scratch/student"
    while attempt.process.poll() is None:
        time.sleep(0.01)
        if len(list(checkpoints.glob("*/checkpoints/step-????????"))) >= 2:
            attempt.kill("all")
    attempt.finish()
    return place


def corruption(world: World, tally: Tally, seed: int) -> None:
    """One file of a run damaged, and the run again: the same result, or one line of refusal that
    `kdflow store verify --repair` mends.
    """
    rng = random.Random(seed)
    place = half_done(world, f"corrupt-{seed}", rng)
    kinds: dict[str, list[Path]] = {}
    for path in sorted(place.folder.rglob("*")):
        own = path.is_relative_to(place.folder / "store") or path.is_relative_to(
            place.folder / "scratch"
        )
        if own and path.is_file():
            kinds.setdefault(kind_of(path.relative_to(place.folder)), []).append(path)
    kind = rng.choice(sorted(kinds))
    victim, damage = rng.choice(kinds[kind]), rng.choice(sorted(DAMAGES))
    victim.write_bytes(DAMAGES[damage](victim.read_bytes(), rng))
    label = f"corruption seed={seed} {kind}: {damage}"
    print(label, flush=True)
    code, output = place.start().finish()
    expected = world.reference["offpolicy"].result()
    outcome = "same result"
    if code == 1 and "Traceback" not in output and "error: " in output:
        Attempt(place, "store", *_where(place), "verify", "--repair").finish()
        code, again = place.start().finish()
        outcome, output = "refused, repaired, same result", f"{output}\n--- repaired\n{again}"
    if code != 0 or "Traceback" in output or place.result() != expected:
        outcome = "OTHER"
        tally.fail(f"{label}: exit code {code}, same {place.result() == expected}\n{output}")
    else:
        shutil.rmtree(place.folder)
    tally.outcomes[kind, outcome] += 1


def _where(place: Place) -> list[str]:
    return ["--root", str(place.folder / "store"), "--scratch", str(place.folder / "scratch")]


def report(tally: Tally) -> None:
    print(f"\n{'kills of':<55}number")
    for kind, count in sorted(tally.kills.items()):
        print(f"{kind:<55}{count}")
    print(f"{'in all':<55}{tally.kills.total()}")
    print(f"\n{'kind of file':<55}outcome")
    for (kind, outcome), count in sorted(tally.outcomes.items()):
        print(f"{kind[-54:]:<55}{outcome}: {count}")
    print(f"\n{len(tally.failures)} failures")
    for failure in tally.failures:
        print(failure.splitlines()[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-chain", type=int, default=8)
    parser.add_argument("--corruptions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first chain and corruption")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    world, tally, seed = World(folder), Tally(), options.seed
    while tally.kills.total() < options.kills:
        wanted = min(options.per_chain, options.kills - tally.kills.total())
        done = chain_of_kills(world, tally, seed, wanted)
        print(f"chain of seed {seed}: {done} kills, {tally.kills.total()} in all", flush=True)
        seed += 1
    for number in range(options.corruptions):
        corruption(world, tally, options.seed + number)
    report(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
