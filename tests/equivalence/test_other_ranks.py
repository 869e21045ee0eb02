"""Training goes on from a checkpoint on another number of ranks."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from kdflow_core.student.checkpoint import completed_steps
from tests.processes import run_ranks
from tests.small_training import NARROW, SmallTraining

STEPS, SEQUENCES = 7, 6
GROUPS = [{"names": "model.layers.0.*", "frozen": True}, {"names": "*embed*", "lr": 3e-3}]
PARTS = ((1, 1, 2), (2, 1, 3), (4, 2, 5), (3, 1, 6), (1, 1, STEPS))  # ranks, replicas, last step


def rank_main(
    rank: int,
    ranks: int,
    replicas: int,
    stop: int,
    folder: Path,
    models: tuple[Path, Path],
    fields: dict[str, Any],
) -> None:
    store = f"file://{folder}/rendezvous-{stop}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    student, teacher = models
    training = SmallTraining(
        folder / "checkpoints",
        student=student,
        teacher=teacher,
        steps=STEPS,
        per_step=SEQUENCES,
        replicas=replicas,
        **fields,
    )
    training.run(stop)
    training.trainer.save()
    training.trainer.wait()
    if replicas > 1:
        assert_alike(list(training.trainer.module.parameters()))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(training.trainer.module, options=options)
    if rank == 0:
        torch.save((weights, training.reporter.messages), folder / f"after-{stop}.pt")
    dist.destroy_process_group()


def assert_alike(parameters: Sequence[torch.Tensor]) -> None:
    """Replicas hold the same, to the last bit."""
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        mine = parameter.to_local().contiguous()
        parts = [torch.empty_like(mine) for _ in range(parameter.device_mesh.size(0))]
        dist.all_gather(parts, mine, group=parameter.device_mesh.get_group(0))
        assert all(torch.equal(part, mine) for part in parts)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"optimizer": {"type": "muon"}}, (1e-3, 2e-4)),
        ({"parameter_groups": GROUPS}, (1e-3, 2e-4)),
        ({"offload": True}, (1e-3, 2e-4)),
        # Four numbers further at most; and about half of how far weights move in all.
        (NARROW, (2**-5, 4e-3)),
        # Rounded at random, and so a little further.
        ({"optimizer": {"type": "adamw", "moments_dtype": "float8"}}, (2**-5, 4e-3)),
    ],
    ids=["muon", "groups", "offloaded", "narrow", "float8"],
)
def test_ranks_may_change_at_every_checkpoint(
    tmp_path: Path,
    student_folder: Path,
    teacher_folder: Path,
    fields: dict[str, Any],
    tolerance: tuple[float, float],
) -> None:
    """One, two, two times two, three and one again end where one alone does."""
    models = (student_folder, teacher_folder)
    changing, alone = tmp_path / "changing", tmp_path / "alone"
    for folder, parts in ((alone, ((1, 1, STEPS),)), (changing, PARTS)):
        folder.mkdir()
        first = 0
        for ranks, replicas, stop in parts:
            run_ranks(rank_main, ranks, replicas, stop, folder, models, fields, ranks=ranks)
            assert completed_steps(folder / "checkpoints")[-1] == stop
            _, messages = torch.load(folder / f"after-{stop}.pt")
            assert any(re.match(f"training from step {first} of {STEPS}", m) for m in messages)
            first = stop
    expected, _ = torch.load(alone / f"after-{STEPS}.pt")
    found, _ = torch.load(changing / f"after-{STEPS}.pt")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance[0], atol=tolerance[1])
