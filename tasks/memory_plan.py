"""What the parts of an on-policy run hold in each phase of a round, before anything is loaded."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema.models import PretrainedModel
from configs.schema.rollout import SglangRollout
from configs.schema.run import RunConfig
from configs.schema.teacher import InProcessTeacher
from kdflow_core.models.folders import resolve_folder
from storage.artifact import ArtifactRef
from tasks.stages import StageSpec, open_store

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
WEIGHTS, MOMENTS, GRADIENTS = 4, 8, 4  # bytes of a parameter in training: float32, AdamW
HEADER_BYTES = 8
PHASES = ("roll out", "swap weights", "score", "train")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The bytes that each part holds on one device, or of one rank's process."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def memory_plan(spec: StageSpec) -> list[Phase]:
    """The phases of a round, on the device of a rank that also has the rollout engine, if one has.

    Activations, and states that wait for the loss, come on top: they depend on the texts.
    """
    run = spec.run
    assert run.on_policy is not None
    student, teacher = (num_parameters(_folder(spec, side)) for side in ("student", "teacher"))
    ranks, rollout = run.student.num_ranks, run.on_policy.rollout
    engine = student * DTYPE_BYTES[rollout.dtype]
    beside = True
    if isinstance(rollout, SglangRollout):
        engine = engine // rollout.tensor_parallel
        beside = rollout.first_gpu < ranks
    trained = 0 if run.student.lora else student  # adapters are small
    held = {
        "student": (student * WEIGHTS + trained * MOMENTS) // ranks,
        "teacher": _teacher_bytes(run, teacher),
        "engine": engine if beside else 0,
    }
    sleeps = {
        "student": run.student.sleep,
        "teacher": isinstance(run.teacher, InProcessTeacher) and run.teacher.sleep,
        "engine": isinstance(rollout, SglangRollout) and rollout.sleep,
    }
    awake = {
        "roll out": {"engine"},
        "swap weights": {"engine", "student"},
        "score": {"teacher"},
        "train": {"student"},
    }
    extra = {
        "swap weights": {"buckets": 2 * rollout.bucket_mb * 10**6},
        "train": {
            "gradients": trained * GRADIENTS // ranks,
            "logits": run.loss.logits_memory_mb * 10**6,
        },
    }
    return [
        Phase(
            name=name,
            parts={
                part: size
                for part, size in held.items()
                if size and (part in awake[name] or not sleeps[part])
            }
            | extra.get(name, {}),
        )
        for name in PHASES
    ]


def plan_lines(phases: list[Phase]) -> list[str]:
    """The plan for people."""
    lines = [
        f"memory to {phase.name}: {phase.total / 1e9:.2f} GB ("
        + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in phase.parts.items())
        + ")"
        for phase in phases
    ]
    peak = max(phases, key=lambda phase: phase.total)
    lines.append(
        f"peak memory of a device: {peak.total / 1e9:.2f} GB, to {peak.name}; the engine's cache, "
        "activations and waiting states come on top"
    )
    return lines


def num_parameters(folder: Path) -> int:
    """The parameters in a model's safetensors files, by their headers."""
    return sum(
        math.prod(tensor["shape"])
        for path in folder.glob("*.safetensors")
        for name, tensor in _header(path).items()
        if name != "__metadata__"
    )


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(HEADER_BYTES), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        return header


def _folder(spec: StageSpec, side: str) -> Path:
    made: ArtifactRef | None = spec.inputs.get(f"{side}_model")
    if made is not None:
        return open_store(spec.run).local_copy(made)
    model = spec.run.teacher.model if side == "teacher" else spec.run.student.model
    assert isinstance(model, PretrainedModel)
    return resolve_folder(model.path, model.revision)


def _teacher_bytes(run: RunConfig, parameters: int) -> int:
    """Of one rank's part of the teacher; none where the student teaches itself."""
    if not run.algorithm.TEACHER_STATES:
        return 0
    return parameters * DTYPE_BYTES[run.teacher.dtype] // run.teacher.ranks_per_replica
