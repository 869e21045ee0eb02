"""Rounds of on-policy distillation, ours and TRL's: same models, prompts and sampling, one run.

`python -m tests.benchmarks.on_policy`. One optimizer step a round,
reverse KL, on answers that the student has just sampled. Prints the median round of each subject
without the first, where ours spends it, and what a swap of weights costs against a plain copy of
the same bytes.
"""

import argparse
import json
import logging
import platform
import shutil
import statistics
import sys
import tempfile
import time
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.load import validate_run
from configs.schema.run import RunConfig
from tasks.forecast.memory import num_parameters
from tasks.rounds.round_record import RoundRecord
from tasks.rounds.rounds_at_work import RoundsAtWork
from tasks.stages.identity import stage_spec
from tasks.stages.planning import plan_stages
from tests.benchmarks.subjects import SUMS, quickstart_model
from tests.conftest import run_inline

PACKAGES = ("torch", "transformers", "trl", "sglang")


def untrained(folder: Path, copy: Path) -> Path:
    """A model like that of a folder, with new weights."""
    shutil.copytree(folder, copy)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(copy)
    return copy


def recipe(args: argparse.Namespace, folder: Path, engine: str) -> RunConfig:
    return validate_run(
        {
            "name": "benchmark",
            "mode": "onpolicy",
            "data": {
                "sources": [{"type": "files", "path": str(args.data.absolute())}],
                "max_length": 256,
                "heldout_fraction": 0.1,
            },
            "teacher": {
                "type": "transformers",
                "model": {"type": "pretrained", "path": str(args.teacher.absolute())},
                "dtype": "float32",
                "tokens_per_batch": args.micro_batch_tokens,
            },
            "student": {
                "model": {"type": "pretrained", "path": str(args.student.absolute())},
                "compute_dtype": "float32",
                "lr": 1e-5,
                "global_batch_size": args.prompts,
                "micro_batch_tokens": args.micro_batch_tokens,
                "checkpoint_every": 10**6,
            },
            "loss": {"divergence": {"type": "reverse_kl"}, "kd_ratio": 1.0, "logits_memory_mb": 64},
            "on_policy": {
                "rounds": args.rounds,
                "prompts_per_round": args.prompts,
                "max_new_tokens": args.new_tokens,
                "heldout_sequences": 0,
                "checkpoint_rounds": 10**6,  # TRL's trainer is told to write none
                "rollout": {"type": engine, "dtype": "float32"},
            },
            "storage": {"root": str(folder / "store"), "scratch": str(folder / "scratch")},
            "tracking": {"tensorboard": False},
        }
    )


def ours(args: argparse.Namespace, engine: str) -> list[RoundRecord]:
    """The records of all rounds but the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = recipe(args, Path(folder), engine)
        done = run_inline(run, until="extract")
        spec = stage_spec(plan_stages(run)["train"], run, done)
        records = []
        with RoundsAtWork(spec, logging.getLogger("benchmark")) as work:
            for number in range(1, args.rounds + 1):
                work.roll_out(number)
                work.score(number)
                records.append(work.record(work.train(number)))
        return records[1:]


def trl(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and sampled tokens of TRL's median step, in a process of its own."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_trl, args=(there, vars(args)))
    process.start()
    there.close()
    found: dict[str, float] = here.recv()
    process.join()
    return found


def _trl(answer: Connection, options: dict[str, Any]) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    rows = [json.loads(line) for line in options["data"].read_text().splitlines()]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    begins: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - begins[-1])

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(options["student"], dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(
                options["teacher"], dtype=torch.float32
            ),
            args=DistillationConfig(
                output_dir=folder,
                beta=1.0,
                temperature=1.0,
                max_completion_length=options["new_tokens"],
                per_device_train_batch_size=options["prompts"],
                max_steps=options["rounds"],
                learning_rate=1e-5,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(options["student"]),
            callbacks=[Clock()],
        )
        trainer.train()
        lengths = [
            entry["completions/mean_length"]
            for entry in trainer.state.log_history
            if "completions/mean_length" in entry
        ]
    median = statistics.median(seconds[1:])
    answer.send({"seconds": median, "mean_length": statistics.mean(lengths) if lengths else 0.0})


def plain_copy(num_bytes: int) -> float:
    """Bytes per second of copying so many bytes from one tensor to another, best of five."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)


def summary(records: list[RoundRecord]) -> dict[str, Any]:
    parts = {name for record in records for name in record.seconds}
    split = {
        name: statistics.median(record.seconds.get(name, 0.0) for record in records)
        for name in sorted(parts)
    }
    return {
        "seconds": split.pop("round"),
        "split": split,
        "mean_length": statistics.mean(record.mean_length for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, help="by default the quick start's")
    parser.add_argument("--student", type=Path, help="by default the quick start's")
    parser.add_argument("--data", type=Path, default=SUMS, help="JSON lines with prompts")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="a student of new weights, which hardly ever ends an answer: all are of equal length",
    )
    args = parser.parse_args()
    args.teacher = args.teacher or quickstart_model("teacher")
    args.student = args.student or quickstart_model("student")
    with tempfile.TemporaryDirectory() as folder:
        if args.untrained:
            args.student = untrained(args.student, Path(folder) / "student")
        result = measured(args)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What all subjects need for their rounds."""
    subjects = {"trl": trl(args)}
    for engine in ("sglang", "transformers"):
        subjects[engine] = summary(ours(args, engine))
    num_bytes = 4 * num_parameters(args.student)
    swapped = num_bytes / subjects["sglang"]["split"]["swap"]  # type: ignore[index]
    copied = plain_copy(num_bytes)
    return {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": {"processor": platform.processor(), "cores": torch.get_num_threads()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "subjects": subjects,
        "trl over ours": {
            engine: subjects["trl"]["seconds"] / subjects[engine]["seconds"]
            for engine in ("sglang", "transformers")
        },
        "swap": {
            "GB": num_bytes / 1e9,
            "GB/s": swapped / 1e9,
            "plain copy, GB/s": copied / 1e9,
            "of a plain copy": swapped / copied,
        },
    }


if __name__ == "__main__":
    main()
