"""Tokens per second of a teacher's hidden states: same model, same ids, one run.

`python -m tests.benchmarks.teacher MODEL_FOLDER`. Subjects: SGLang in process, transformers a
sequence at a time, transformers in padded batches, and before these, in a process of its own,
SGLang's `Engine.generate(return_hidden_states=True)`. Every subject runs a warm-up, and then all of
them in turn, `--rounds` times; the best round counts.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from configs.schema.teacher import Teacher
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_config
from kdflow_core.models.tokenizers import load_tokenizer, true_vocabulary_size
from kdflow_core.teacher import build_engine
from kdflow_core.teacher.streaming import stream_states
from tests.benchmarks.generate import best_of
from tests.benchmarks.subjects import quickstart_model


def sequences(count: int, longest: int, vocabulary: int) -> list[TokenSequence]:
    """Random ids; lengths uniform from a quarter of `longest`, the second half supervised."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(longest // 4, longest + 1, count)
    return [
        TokenSequence(
            ids_T=rng.integers(0, vocabulary, n).astype(np.int32),
            supervised_T=np.arange(n) >= n // 2,
        )
        for n in lengths
    ]


def teacher(folder: Path, args: argparse.Namespace, **options: Any) -> TeacherEngine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = true_vocabulary_size(load_tokenizer(folder))
    config = {"model": {"type": "pretrained", "path": str(folder)}, "dtype": args.dtype}
    return build_engine(
        TypeAdapter(Teacher).validate_python(config | options),
        folder=folder,
        head=load_head(folder, load_config(folder), size),
        longest=args.longest,
        device=device,
    )


def through(engine: TeacherEngine, batch: list[TokenSequence]) -> Callable[[], None]:
    def run() -> None:
        for _ in stream_states(engine, batch, window_tokens=10**9):
            pass

    return run


def time_in_forward(engine: Any) -> list[float]:
    """Seconds that each forward of the model itself takes from now on."""
    runner = engine._runner._runner
    forward, seconds = runner.model.forward, []

    def timed(*inputs: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = forward(*inputs, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        return result

    runner.model.forward = timed
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="by default the quick start's")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder = args.folder or quickstart_model("teacher")
    vocabulary = true_vocabulary_size(load_tokenizer(args.folder))
    batch = sequences(args.count, args.longest, vocabulary)
    tokens = sum(len(s.ids_T) for s in batch)
    packed = {"tokens_per_batch": args.tokens_per_batch}
    best = {
        "sglang Engine.generate": best_of(
            args.folder,
            [s.ids_T.tolist() for s in batch],
            dtype=args.dtype,
            tokens=args.tokens_per_batch,
            rounds=args.rounds,
        )
    }
    ours = teacher(args.folder, args, type="sglang", **packed)
    subjects = {
        "sglang in process": through(ours, batch),
        "transformers per sequence": through(
            teacher(args.folder, args, type="transformers", tokens_per_batch=1), batch
        ),
        "transformers batched": through(
            teacher(args.folder, args, type="transformers", **packed), batch
        ),
    }
    for run in subjects.values():
        run()
    for _ in range(args.rounds):
        for name, run in subjects.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    inside = time_in_forward(ours)
    begin = time.perf_counter()
    subjects["sglang in process"]()
    whole = time.perf_counter() - begin
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    rates = {name: tokens / seconds for name, seconds in best.items()}
    result = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "sglang")},
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "folder"},
        "tokens": tokens,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "sglang_in_process_over": {
            name: round(rates["sglang in process"] / rate, 2) for name, rate in rates.items()
        },
        "share_outside_forward": round(1 - sum(inside) / whole, 4),
    }
    print(json.dumps(result, indent=1))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
