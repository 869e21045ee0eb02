"""Run by test_disk_full inside a mount namespace: the disk of the checkpoints fills up."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kdflow_core.errors import TrainingError
from kdflow_core.student.checkpoint import CheckpointWriter, completed_steps


def main(disk: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{disk}/rendezvous", rank=0, world_size=1)
    model = torch.nn.Linear(300, 300)
    writer = CheckpointWriter(disk / "checkpoints", keep=9)
    error = ""
    for step in range(1, 20):
        try:
            writer.save(step, model, [torch.optim.SGD(model.parameters())])
            writer.wait()
        except TrainingError as full:
            error = str(full)
            break
    steps = completed_steps(disk / "checkpoints")
    print(json.dumps({"error": error, "steps": steps}))  # noqa: T201 - the result for the test
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
