"""Seconds per training step on replayed states against states that are in memory already.

`python -m tests.benchmarks.replay FOLDER`. A random Llama learns from random states of the same
sequences, alternately from the store (each codec, as training reads it) and from tensors in
memory, in one process; after an epoch that reads everything once, the medians of the second epoch
are compared.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.student import StudentConfig
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.algorithms.vanilla_kd import VanillaKD
from kdflow_core.batching import Division
from kdflow_core.contracts import Example, HiddenRows, OutputHead, SignalSource, TokenSequence
from kdflow_core.losses.chunked import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.student.module import DistillationModule, shard
from kdflow_core.student.optim import build_optimizers
from kdflow_core.student.prefetch import PrefetchedStates
from kdflow_core.student.schedule import BatchSchedule
from kdflow_core.student.step import training_step
from tasks.jobs.stored import StoredStates, bfloat16_tensor
from tests.benchmarks.store import CODECS, Kdflow, Rows
from tests.benchmarks.subjects import work_folder

VOCABULARY = 8192
MODEL = {"type": "pretrained", "path": "."}
CONFIG = StudentConfig.model_validate({"model": MODEL, "max_steps": 1})


class InMemory:
    """All rows as tensors."""

    def __init__(self, rows: Rows) -> None:
        self.hidden_size = rows.bits_RH.shape[1]
        self._rows = {s.digest: bfloat16_tensor(rows.of(i)) for i, s in enumerate(rows.sequences)}

    def begin_step(self, step: int) -> None:
        pass

    def rows(self, sequence: TokenSequence) -> HiddenRows:
        states_NH = self._rows[sequence.digest]
        return HiddenRows(buffer_RH=states_NH, index_N=torch.arange(len(states_NH)))


class AsExamples:
    """Every sequence as student and teacher see it."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.sequences)

    def __getitem__(self, index: int) -> Example:
        sequence = self._rows.sequences[index]
        return Example(source="random", views=dict.fromkeys(("student", "teacher"), sequence))

    def lengths(self, side: str) -> np.ndarray:
        return self._rows.lengths + 1

    def supervised_counts(self, side: str) -> np.ndarray:
        return self._rows.lengths


def module_of(hidden: int, teacher_hidden: int) -> DistillationModule:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config)
    ingredients = Ingredients(
        spec=LossSpec(divergence=ForwardKL(), kd_ratio=0.9, logits_bytes=64 * 10**6),
        model=model,
        heads={"teacher": OutputHead(weight_VH=torch.randn(VOCABULARY, teacher_hidden) / 50)},
        vocabulary_size=VOCABULARY,
    )
    module = DistillationModule(
        model=model,
        algorithm=VanillaKD(VanillaKDConfig(), ingredients),
        vocabulary_size=VOCABULARY,
    )
    shard(module, mesh=init_device_mesh("cpu", (1,)), compute_dtype=torch.float32)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="by default a temporary one")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--student-hidden", type=int, default=256)
    args = parser.parse_args()
    with work_folder(args.folder) as args.folder:
        run(args)


def run(args: argparse.Namespace) -> None:
    store = f"file://{args.folder.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    rows = Rows(args.megabytes * 10**6, args.hidden)
    schedule = BatchSchedule(
        lengths=rows.lengths + 1,
        supervised_counts=rows.lengths,
        global_batch_size=8,
        division=Division(tokens=2048),
        num_ranks=1,
        seed=0,
        epochs=2,
        max_steps=None,
    )
    sources: dict[str, SignalSource] = {"memory": InMemory(rows)}
    for codec in CODECS:
        subject = Kdflow(rows, args.folder / codec, codec)
        subject.write()
        sources[codec] = PrefetchedStates(
            StoredStates(subject.open()),
            sequences_of=lambda step: [rows.sequences[i] for i in schedule.sequences(step)],
            num_steps=schedule.num_steps,
        )
    seconds = train(module_of(args.student_hidden, args.hidden), schedule, rows, sources)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "steps": schedule.steps_per_epoch,
        "seconds a step": medians,
        "relative to memory": {name: taken / medians["memory"] for name, taken in medians.items()},
    }
    print(json.dumps(result, indent=1))  # noqa: T201 - the result
    dist.destroy_process_group()


def train(
    module: DistillationModule,
    schedule: BatchSchedule,
    rows: Rows,
    sources: dict[str, SignalSource],
) -> dict[str, list[float]]:
    """Seconds of the second epoch's steps, by source; every step is made once with each."""
    optimizers = build_optimizers(module, CONFIG)
    examples, seconds = AsExamples(rows), {name: [] for name in sources}
    for step in range(schedule.num_steps):
        for name, states in sources.items():
            begin = time.perf_counter()
            states.begin_step(step)
            training_step(
                module=module,
                optimizers=optimizers,
                batches=schedule.step(step),
                examples=examples,
                states=[states],
                rank=0,
                config=CONFIG,
                device=torch.device("cpu"),
            )
            if step >= schedule.steps_per_epoch:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
