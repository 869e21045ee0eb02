"""Several epochs by replay, the teacher's pass over the data counted, against the same epochs live.

`python -m tests.benchmarks.epochs`. Untrained models with 49k tokens, one rank, the same steps. By
replay the teacher reads every sequence once and writes its states; live it reads them again in
every epoch. How much that saves goes by how much larger the teacher is: `--layers` sets it.

Prints the seconds of both stages, of a second training on the same states, and the times over those
of the live one, with the range over turns.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from configs.load import validate_run
from configs.schema.run import RunConfig
from storage.artifact import ArtifactRef
from tasks.execution.launch import launch_stage
from tasks.presentation.tracking import METRICS_FILE, read_metrics
from tasks.stages.identity import open_store, stage_spec
from tasks.stages.planning import plan_stages
from tests.benchmarks.offpolicy import write_data
from tests.benchmarks.subjects import distillation, quickstart_model, save_untrained

PACKAGES = ("torch", "transformers", "zarr")
STUDENT_LAYERS, STUDENT_WIDTH = 6, 576


def make_model(folder: Path, *, layers: int, width: int) -> int:
    """An untrained model with the quick start's tokens; how many weights its layers have."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model("teacher"))
    model = save_untrained(
        folder,
        tokenizer,
        vocabulary=len(tokenizer),
        layers=layers,
        width=width,
        key_value_heads=width // 64,
    )
    return sum(p.numel() for p in model.model.layers.parameters())


def recipe(args: argparse.Namespace, folder: Path, delivery: str) -> RunConfig:
    tree = distillation(
        folder,
        teacher=folder / "teacher",
        student=folder / "student",
        dtype=args.dtype,
        tokens_per_pass=2048,
    )
    tree["student"] |= {"epochs": args.epochs, "global_batch_size": 4}
    tree["storage"]["root"] = str(folder / f"store-{delivery}")
    return validate_run(tree | {"name": f"epochs-{delivery}", "delivery": delivery})


def measure(run: RunConfig) -> dict[str, Any]:
    """Seconds of the teacher's pass, of the training and of a second one, and its losses. What the
    next turn needs anew is taken out of the store.
    """
    seconds = {"extract": 0.0}
    done: dict[str, ArtifactRef] = {}
    plan, store = plan_stages(run), open_store(run)

    def timed(stage: str, name: str) -> ArtifactRef:
        spec = stage_spec(plan[stage], run, done)
        begin = time.perf_counter()
        ref = launch_stage(spec, logging.getLogger("epochs"))
        seconds[name] = time.perf_counter() - begin
        return ref

    for stage, identity in plan.items():
        ref = timed(stage, stage)
        if stage == "train":
            break
        done = done | {identity.output: ref}
    losses = [record["loss"] for record in read_metrics(Path(ref.uri) / METRICS_FILE)]
    store.retract(ref.kind, ref.digest)
    timed("train", "train again")
    for stage in {"extract", "train"} & plan.keys():
        store.retract(plan[stage].kind, plan[stage].digest)
    wanted = ("extract", "train", "train again")
    return {name: seconds[name] for name in wanted} | {"losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of the teacher")
    parser.add_argument("--width", type=int, default=1024, help="of the teacher")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--words", type=int, nargs=2, default=(30, 450), help="of an answer")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.jsonl", args.samples, tuple(args.words))
        weights = {
            "teacher": make_model(folder / "teacher", layers=args.layers, width=args.width),
            "student": make_model(folder / "student", layers=STUDENT_LAYERS, width=STUDENT_WIDTH),
        }
        turns = [
            {way: measure(recipe(args, folder, way)) for way in ("replay", "live")}
            for _ in range(args.turns)
        ]
    result = {
        "arguments": vars(args),
        "machine": {"processor": platform.processor(), "cores": torch.get_num_threads()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "weights of the layers": weights,
        "seconds": [
            {way: {k: v for k, v in found.items() if k != "losses"} for way, found in turn.items()}
            for turn in turns
        ],
        "losses differ by": max(
            abs(a / b - 1)
            for a, b in zip(turns[0]["replay"]["losses"], turns[0]["live"]["losses"], strict=True)
        ),
        "replay over live": ranged(
            [(t["replay"]["extract"] + t["replay"]["train"]) / t["live"]["train"] for t in turns]
        ),
        "a second training by replay over live": ranged(
            [t["replay"]["train again"] / t["live"]["train"] for t in turns]
        ),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def ranged(ratios: list[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


if __name__ == "__main__":
    main()
