"""What FSDP gathers in a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from configs.schema.algorithm import VanillaKDConfig
from configs.schema.student import StudentConfig
from kdflow_core.algorithms import build_algorithm
from kdflow_core.algorithms.base import Ingredients
from kdflow_core.contracts import Example, TokenSequence
from kdflow_core.loops.probe import RandomStates
from kdflow_core.losses.elementwise import LossSpec
from kdflow_core.losses.forward_kl import ForwardKL
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_causal_lm, load_config
from kdflow_core.student.module import DistillationModule, shard
from kdflow_core.student.optim import build_optimizer
from kdflow_core.student.schedule import StepBatches
from kdflow_core.student.step import training_step
from tests.conftest import VOCABULARY

RANKS, MICRO_BATCHES = 2, 3
MODEL = {"type": "pretrained", "path": "."}
CONFIG = StudentConfig.model_validate({"model": MODEL, "max_steps": 2})
GATHER = "c10d::_allgather_base_"


def sequence(seed: int) -> TokenSequence:
    ids_T = np.random.default_rng(seed).integers(0, VOCABULARY, 20).astype(np.int32)
    return TokenSequence(ids_T=ids_T, supervised_T=np.arange(20) > 9)


def step_of(num_micro_batches: int) -> StepBatches:
    """One sequence in each micro-batch of each rank."""
    batches = tuple(
        tuple((rank * num_micro_batches + k,) for k in range(num_micro_batches))
        for rank in range(RANKS)
    )
    count = RANKS * num_micro_batches
    return StepBatches(
        micro_batches=batches,
        num_tokens=10 * count,
        num_input_tokens=20 * count,
        num_positions=20 * count,
        epoch=1.0,
    )


def gathers(rank: int, folders: tuple[str, str], num_micro_batches: int) -> int:
    """All-gathers of the second step: the first one sets FSDP up."""
    student, teacher = map(Path, folders)
    head = load_head(teacher, load_config(teacher), VOCABULARY)
    model = load_causal_lm(student, dtype=torch.float32, attention="sdpa")
    spec = LossSpec(divergence=ForwardKL(), kd_ratio=0.9, logits_bytes=10**6)
    ingredients = Ingredients(
        spec=spec, model=model, heads={"teacher": head}, vocabulary_size=VOCABULARY
    )
    module = DistillationModule(
        model=model,
        algorithm=build_algorithm(VanillaKDConfig(), ingredients),
        vocabulary_size=VOCABULARY,
    )
    shard(module, mesh=init_device_mesh("cpu", (RANKS,)), compute_dtype=torch.float32)
    optimizer = build_optimizer(module, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    examples = [
        Example(source="random", views=dict.fromkeys(("student", "teacher"), sequence(k)))
        for k in range(RANKS * num_micro_batches)
    ]
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            training_step(
                module=module,
                optimizer=optimizer,
                batches=step_of(num_micro_batches),
                examples=examples,  # type: ignore[arg-type]
                states=[RandomStates(head.weight_VH.shape[1])],
                rank=rank,
                config=CONFIG,
                device=torch.device("cpu"),
            )
    return sum(event.count for event in profiler.key_averages() if GATHER in event.key)


def rank_main(rank: int, folder: str, folders: tuple[str, str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    found = [gathers(rank, folders, number) for number in (1, MICRO_BATCHES)]
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_head_and_embedding_are_gathered_once_a_step(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """However many micro-batches there are; the layers are gathered for each, forward and back."""
    mp.spawn(rank_main, (str(tmp_path), (str(student_folder), str(teacher_folder))), nprocs=RANKS)
    for rank in range(RANKS):
        one, several = torch.load(tmp_path / f"rank-{rank}.pt")
        root = 1
        assert one > root
        assert several - root == MICRO_BATCHES * (one - root)
