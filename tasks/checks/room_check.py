"""Whether the devices can hold what a run puts on them at the least: its models, gradients and
moments, by the headers of their files. Loads torch.
"""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from configs.schema.run import RunConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.errors import ModelError
from tasks.forecast.memory import least_host_memory, least_teacher, least_training, told

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GB = 10**9


def check_room(run: RunConfig, folders: Mapping[str, Path]) -> None:
    """Refuse what no batch size makes fit. Raises ModelError, which says what takes how much."""
    if run.workers.type == "ray":
        return  # the devices are elsewhere
    device, room = _device()
    student, teacher = folders.get("student"), folders.get("teacher")
    ranks = run.student.num_ranks
    if teacher is not None and isinstance(run.teacher, InProcessTeacher):
        # Ranks of one machine may share the pages of files.
        _require(
            "the teacher",
            {"weights": least_teacher(run.teacher, teacher)},
            room,
            device,
            "more teacher.tensor_parallel (teacher.type=sglang); or teacher.dtype=bfloat16",
        )
    if student is not None:
        sleeps = isinstance(run.teacher, InProcessTeacher) and run.teacher.sleep
        beside = teacher if run.teacher_in_training and not sleeps else None
        beside = beside if run.algorithm.reads_signals else None
        on_gpu = device.startswith("GPU")
        parts = least_training(run, student, beside, on_gpu=on_gpu)
        _require(
            f"training (student.num_ranks={ranks})",
            parts,
            room // (1 if on_gpu else ranks),
            device,
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
                _host_memory() // ranks,
                "the host",
                "student.weights_dtype=bfloat16 and student.optimizer={type: adamw, moments_dtype: "
                "float8}; or student.lora",
            )


def _require(what: str, parts: Mapping[str, int], room: int, device: str, remedy: str) -> None:
    if sum(parts.values()) > room:
        raise ModelError(
            f"{what} takes {told(parts)} on each rank at the least, and {device} has "
            f"{room / GB:.2f} GB for it; what helps: {remedy}"
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
