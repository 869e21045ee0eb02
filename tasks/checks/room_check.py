"""Whether the devices can hold what a run puts on them at the least: its models, gradients and
moments, by the headers of their files. Loads torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from configs.schema.run import RunConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.errors import ModelError
from tasks.forecast.memory import least_host_memory, least_teacher, least_training, told

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What ranks find on a machine, in bytes: `gpus` with so much memory each, or none, and the
    host's memory, which all ranks share.
    """

    name: str
    host: int
    gpus: int = 0
    gpu: int = 0

    def holds(self, size: int, *, in_host: bool = False) -> int:
        """How many ranks that take so much each it can hold."""
        shared = self.host // max(1, size)
        if self.gpus == 0:
            return shared
        return min(self.gpus, shared) if in_host else self.gpus * (size <= self.gpu)


def check_room(run: RunConfig, folders: Mapping[str, Path]) -> None:
    """Refuse what no batch size makes fit. Raises ModelError, which says what takes how much."""
    if run.workers.type == "ray":
        return  # the devices are elsewhere: see `cluster_check`
    device, room = _device()
    host = _host_memory()
    ranks = max(run.student.num_ranks, run.teacher.num_ranks)
    if device.startswith("GPU"):
        here = Machine(name=device, host=host, gpus=ranks, gpu=room)
    else:
        here = Machine(name=device, host=room)
    check_room_on([here], run, folders)


def check_room_on(machines: Sequence[Machine], run: RunConfig, folders: Mapping[str, Path]) -> None:
    """See `check_room`."""
    student, teacher = folders.get("student"), folders.get("teacher")
    ranks = run.student.num_ranks
    on_gpu = any(machine.gpus for machine in machines)
    if on_gpu:
        machines = [machine for machine in machines if machine.gpus]
    if teacher is not None and isinstance(run.teacher, InProcessTeacher):
        # Ranks of one machine may share the pages of files.
        _require(
            "the teacher",
            {"weights": least_teacher(run.teacher, teacher)},
            machines,
            1,
            "more teacher.tensor_parallel (teacher.type=sglang); or teacher.dtype=bfloat16",
        )
    if student is not None:
        sleeps = isinstance(run.teacher, InProcessTeacher) and run.teacher.sleep
        beside = teacher if run.teacher_in_training and not sleeps else None
        beside = beside if run.algorithm.reads_signals else None
        parts = least_training(run, student, beside, on_gpu=on_gpu)
        _require(
            f"training (student.num_ranks={ranks})",
            parts,
            machines,
            ranks,
            "more student.num_ranks, which share the student; student.weights_dtype=bfloat16 and "
            "student.optimizer={type: adamw, moments_dtype: bfloat16}; student.lora; a smaller "
            "loss.logits_memory_mb; teacher.sleep"
            + ("; or student.offload, to the host's memory" if on_gpu else ""),
        )
        if on_gpu:
            _require(
                "the student that student.offload keeps there"
                if run.student.offload
                else "a checkpoint",
                least_host_memory(run.student, student),
                machines,
                ranks,
                "student.weights_dtype=bfloat16 and student.optimizer={type: adamw, moments_dtype: "
                "float8}; or student.lora",
                in_host=True,
            )


def _require(
    what: str,
    parts: Mapping[str, int],
    machines: Sequence[Machine],
    ranks: int,
    remedy: str,
    *,
    in_host: bool = False,
) -> None:
    size = sum(parts.values())
    if sum(machine.holds(size, in_host=in_host) for machine in machines) >= ranks:
        return

    def room(machine: Machine) -> str:
        of_gpu = machine.gpus > 0 and not in_host
        name = f"the host of {machine.name}" if machine.gpus and in_host else machine.name
        share = machine.gpu if of_gpu else machine.host // (ranks if len(machines) == 1 else 1)
        return f"{name} has {share / GB:.2f} GB for it"

    raise ModelError(
        f"{what} takes {told(parts)} on each rank at the least, and "
        f"{', '.join(room(machine) for machine in machines)}; what helps: {remedy}"
    )


def _device() -> tuple[str, int]:
    """The smallest device, and its memory in bytes: of GPUs each rank has its own, the host's is
    for all ranks.
    """
    if torch.cuda.is_available():
        sizes = [
            torch.cuda.get_device_properties(k).total_memory
            for k in range(torch.cuda.device_count())
        ]
        return "GPU " + str(sizes.index(min(sizes))), min(sizes)
    return "this machine", _host_memory()


def _host_memory() -> int:
    """In bytes, as far as this process may have it."""
    total = int(psutil.virtual_memory().total + psutil.swap_memory().total)
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total
