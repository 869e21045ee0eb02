"""What the parts of an on-policy run hold in each phase of a round, before anything is loaded."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from configs.schema.algorithm import DualSpaceConfig, SelfDistillationConfig
from configs.schema.models import PretrainedModel
from configs.schema.on_policy import OnPolicyConfig
from configs.schema.rollout import Rollout, TransformersRollout
from configs.schema.run import RunConfig
from configs.schema.student import FLOAT8_GROUP, MuonConfig, Optimizer, StudentConfig
from configs.schema.teacher import InProcessTeacher, Teacher
from configs.schema.workers import RayWorkers
from kdflow_core.models.checkpoints import read_checkpoint
from kdflow_core.models.families.base import cached_values
from kdflow_core.models.folders import context_length, resolve_folder, text_config
from storage.artifact import ArtifactRef
from tasks.stages.identity import StageSpec, open_store

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
WIDE = 4  # bytes of a number in float32
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # others take one at the least
ADAMW_MOMENTS, MUON_MOMENTS = 2, 1  # of a weight; Muon's are of a matrix in a numbered layer
NUMBERED = re.compile(r"\.\d+\.")
PHASES = ("roll out", "swap weights", "score", "train")
BUILDING = "build the student"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The bytes that each part holds on one device, or of one rank's process."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What takes `size` bytes in the phases that need it, and in the others unless it `leaves`."""

    size: int
    needed: frozenset[str]
    leaves: bool = True


@dataclass(frozen=True, kw_only=True)
class StudentBytes:
    """What a rank that trains keeps of the student, in bytes; of the weights, those that train; and
    what an offloaded one brings to the device: head and embedding, and a layer beside the next.
    """

    weights: int
    moments: int
    gradients: int
    training_weights: int
    gathered: int


def least_training(
    run: RunConfig, student: Path, teacher: Path | None, *, on_gpu: bool
) -> dict[str, int]:
    """What a rank that trains holds on its device whatever its batches are, in bytes, with the
    `teacher` that runs beside the student and does not leave for it. Activations come on top.
    """
    own = student_bytes(run.student, student)
    logits = {"logits": run.loss.logits_memory_mb * 10**6}
    beside = {} if teacher is None else {"teacher": least_teacher(run.teacher, teacher)}
    if run.student.offload and on_gpu:
        return {"gathered": own.gathered} | logits | beside
    return _held(own) | logits | beside


def least_host_memory(student: StudentConfig, folder: Path) -> dict[str, int]:
    """What a rank on a GPU keeps in the host's memory, in bytes: an offloaded student, or the copy
    of another one for a checkpoint.
    """
    own = student_bytes(student, folder)
    if student.offload:
        return _held(own)
    return {"weights": own.training_weights, "moments": own.moments}


def _held(own: StudentBytes) -> dict[str, int]:
    return {"weights": own.weights, "moments": own.moments, "gradients": own.gradients}


def told(parts: Mapping[str, int]) -> str:
    """Bytes by name, for people."""
    total = sum(parts.values()) / 1e9
    return f"{total:.2f} GB ({', '.join(f'{n} {s / 1e9:.2f}' for n, s in parts.items() if s)})"


def least_teacher(config: Teacher, folder: Path) -> int:
    """The bytes of one rank's part of a teacher, of which some files may be narrower than it is."""
    wide = DTYPE_BYTES[config.dtype]
    whole = sum(
        math.prod(tensor.shape) * min(wide, STORED_BYTES.get(tensor.dtype, 1))
        for tensor in read_checkpoint(folder).tensors.values()
    )
    return whole // config.ranks_per_replica


def memory_phases(spec: StageSpec) -> list[Phase]:
    """The start and the phases of a round, on the device of a rank that also has the rollout
    engine, if one has. At the start the student is built, then the teacher, then the engine, each
    when those before have left the device, if they may; a later round has all that again.

    The teacher's states and the engine's cache are those of texts of the full length. Activations
    come on top, and the cache of SGLang on a GPU, unless rollout.cache_tokens is set.
    """
    run = spec.run
    assert run.on_policy is not None
    ranks = run.student.num_ranks
    student = num_parameters(_folder(spec, "student"))
    own = student_bytes(run.student, _folder(spec, "student"))
    spread = ranks // run.student.replicas
    on_device = _held(own)
    if run.student.offload:
        on_device = {"weights": own.gathered, "moments": 0, "gradients": 0}
    parts = {
        "student": _Part(
            size=on_device["weights"],
            needed=frozenset({BUILDING, "swap weights", "train"}),
            leaves=run.student.sleep or run.student.offload,
        ),
        "moments": _Part(
            size=on_device["moments"],
            needed=frozenset({BUILDING, "train"}),
            leaves=run.student.sleep,
        ),
        "algorithm": _Part(
            size=_algorithm_bytes(spec, student) // spread,
            needed=frozenset({BUILDING, "swap weights", "train"}),
            leaves=run.student.sleep,
        ),
        "teacher": _Part(
            size=_teacher_bytes(spec),
            needed=frozenset({"score"}),
            leaves=isinstance(run.teacher, InProcessTeacher) and run.teacher.sleep,
        ),
        **_engine_parts(spec, run.on_policy.rollout, student),
        "states": _Part(
            size=_state_bytes(spec, run.on_policy), needed=frozenset({"score", "train"})
        ),
        "gradients": _Part(size=on_device["gradients"], needed=frozenset({"train"})),
        "logits": _Part(size=run.loss.logits_memory_mb * 10**6, needed=frozenset({"train"})),
    }
    return [
        Phase(
            name=phase,
            parts={
                name: part.size
                for name, part in parts.items()
                if part.size and (phase in part.needed or (phase != BUILDING and not part.leaves))
            },
        )
        for phase in (BUILDING, *PHASES)
    ]


def _engine_parts(spec: StageSpec, rollout: Rollout, student: int) -> dict[str, _Part]:
    """The rollout engine's share of a rank's device; nothing where it is on another one."""
    folder, run = _folder(spec, "student"), spec.run
    buckets = _Part(size=2 * rollout.bucket_mb * 10**6, needed=frozenset({"swap weights"}))
    if isinstance(rollout, TransformersRollout):
        width, sleeps, answering = 1, False, frozenset({"roll out"})
        tokens = rollout.prompts_per_batch * _longest(spec)
        elsewhere = False
    else:
        width, sleeps = rollout.tensor_parallel, rollout.sleep
        elsewhere = rollout.first_gpu >= run.student.num_ranks
        answering = frozenset({"roll out"})
        tokens = rollout.cache_tokens or 0
    if elsewhere or (isinstance(run.workers, RayWorkers) and not run.engines_beside_student):
        return {"buckets": buckets}
    size = DTYPE_BYTES[rollout.dtype]
    return {
        "engine": _Part(
            size=student * size // width,
            needed=frozenset({"roll out", "swap weights"}),
            leaves=sleeps,
        ),
        "cache": _Part(
            size=tokens * cached_values(text_config(folder)) * size // width,
            needed=answering,
            leaves=sleeps or isinstance(rollout, TransformersRollout),
        ),
        "buckets": buckets,
    }


def memory_lines(phases: list[Phase]) -> list[str]:
    """The plan for people."""
    lines = [
        f"memory to {phase.name}: {phase.total / 1e9:.2f} GB ("
        + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in phase.parts.items())
        + ")"
        for phase in phases
    ]
    peak = max(phases, key=lambda phase: phase.total)
    cache = any("cache" in phase.parts for phase in phases)
    lines.append(
        f"peak memory of a device: {peak.total / 1e9:.2f} GB, to {peak.name}; activations "
        + ("come" if cache else "and the engine's cache come")
        + " on top"
    )
    return lines


def student_bytes(student: StudentConfig, folder: Path) -> StudentBytes:
    """By the headers of a student's files."""
    checkpoint = read_checkpoint(folder)
    wide = DTYPE_BYTES[student.weights_dtype]
    held = checkpoint.exact_in(student.compute_dtype) and not student.float32_residual
    narrow = min(wide, DTYPE_BYTES[student.compute_dtype]) if held else wide
    optimizer = student.optimizer
    muon = isinstance(optimizer, MuonConfig)
    spread = student.num_ranks // student.replicas
    in_parts = student.reduce_gradients == "every_micro_batch"
    weights = training = moments = gradients = 0
    by_layer: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        size = math.prod(tensor.shape)
        numbered = NUMBERED.search(name)
        by_layer[numbered.group() if numbered else ""] += size * DTYPE_BYTES[student.compute_dtype]
        if student.lora is not None or _is_frozen(student, name):  # adapters are small
            weights += size * narrow
            continue
        by_muon = muon and len(tensor.shape) == 2 and numbered
        weights += size * wide
        training += size * wide
        moment = _moment_bytes(optimizer, tensor.shape)
        moments += moment * (MUON_MOMENTS if by_muon else ADAMW_MOMENTS)
        gradients += size * (wide if in_parts else WIDE)
    return StudentBytes(
        weights=weights // spread,
        training_weights=training // spread,
        moments=moments // spread,
        gradients=gradients // spread if in_parts else gradients,
        gathered=by_layer.pop("", 0) + 2 * max(by_layer.values(), default=0),
    )


def _moment_bytes(optimizer: Optimizer, shape: Sequence[int]) -> int:
    """What an optimizer keeps of a tensor's weights, once."""
    size = math.prod(shape)
    if isinstance(optimizer, MuonConfig) or optimizer.moments_dtype == "float32":
        return size * WIDE
    if optimizer.moments_dtype == "bfloat16":
        return size * DTYPE_BYTES["bfloat16"]
    if len(shape) < 2:
        return size * WIDE
    scales = size // shape[-1] * -(-shape[-1] // FLOAT8_GROUP)
    return size + scales * WIDE


def _is_frozen(student: StudentConfig, name: str) -> bool:
    group = next((g for g in student.parameter_groups if fnmatchcase(name, g.names)), None)
    return group is not None and group.frozen


def num_parameters(folder: Path) -> int:
    """The parameters of a model, by the headers of its files."""
    return read_checkpoint(folder).num_parameters


def _folder(spec: StageSpec, side: str) -> Path:
    made: ArtifactRef | None = spec.inputs.get(f"{side}_model")
    if made is not None:
        return open_store(spec.run).local_copy(made)
    model = spec.run.teacher.model if side == "teacher" else spec.run.student.model
    assert isinstance(model, PretrainedModel)
    return resolve_folder(model.path, model.revision)


def _teacher_bytes(spec: StageSpec) -> int:
    """The bytes of one rank's part of the teacher; none where the student teaches itself."""
    run = spec.run
    if not run.algorithm.reads_signals:
        return 0
    parameters = num_parameters(_folder(spec, "teacher"))
    return parameters * DTYPE_BYTES[run.teacher.dtype] // run.teacher.ranks_per_replica


def _algorithm_bytes(spec: StageSpec, student: int) -> int:
    """The bytes of what an algorithm has of its own, over all ranks, gradients aside: projectors,
    which are trained, or an average of the student, which is not.
    """
    algorithm = spec.run.algorithm
    if isinstance(algorithm, DualSpaceConfig):
        widths = [
            int(text_config(_folder(spec, side))["hidden_size"]) for side in ("student", "teacher")
        ]
        return 2 * widths[0] * widths[1] * WIDE * (1 + ADAMW_MOMENTS)
    averages = isinstance(algorithm, SelfDistillationConfig) and algorithm.update == "ema"
    return student * WIDE if averages else 0


def _state_bytes(spec: StageSpec, config: OnPolicyConfig) -> int:
    """The bytes of the states that wait on one rank for the loss."""
    run = spec.run
    if not run.algorithm.reads_signals:
        return 0
    assert isinstance(run.teacher, InProcessTeacher)
    steps = config.steps(run.student.global_batch_size)
    examples = min(run.teacher.forward_batches or steps, steps) * run.student.global_batch_size
    width = int(text_config(_folder(spec, "teacher"))["hidden_size"])
    size = width * DTYPE_BYTES[run.teacher.dtype]
    return examples * _longest(spec) * size // run.student.num_ranks


def _longest(spec: StageSpec) -> int:
    """The longest text of a round, in tokens."""
    contexts = [context_length(_folder(spec, side)) for side in ("student", "teacher")]
    return min(spec.run.data.max_length, *contexts)
