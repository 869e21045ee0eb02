"""What FSDP gathers in a step."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.processes import run_ranks
from tests.small_training import SmallTraining

RANKS, MICRO_BATCHES = 2, 3
GATHER = "c10d::_allgather_base_"


def gathers(folder: Path, folders: tuple[str, str], num_micro_batches: int) -> int:
    """All-gathers of the second step: the first one sets FSDP up. Each rank has so many
    micro-batches, of one sequence.
    """
    student, teacher = map(Path, folders)
    training = SmallTraining(
        folder, student=student, teacher=teacher, steps=2, per_step=RANKS * num_micro_batches
    )
    training.run(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training.run(2)
    return sum(event.count for event in profiler.key_averages() if GATHER in event.key)


def rank_main(rank: int, folder: str, folders: tuple[str, str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    found = [gathers(Path(folder, str(number)), folders, number) for number in (1, MICRO_BATCHES)]
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_head_and_embedding_are_gathered_once_a_step(
    tmp_path: Path, student_folder: Path, teacher_folder: Path
) -> None:
    """However many micro-batches there are; the layers are gathered for each, forward and back."""
    models = (str(student_folder), str(teacher_folder))
    run_ranks(rank_main, str(tmp_path), models, ranks=RANKS)
    for rank in range(RANKS):
        one, several = torch.load(tmp_path / f"rank-{rank}.pt")
        root = 1
        assert one > root
        assert several - root == MICRO_BATCHES * (one - root)
