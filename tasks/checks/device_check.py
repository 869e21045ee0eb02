"""Whether this machine has the devices that a run asks for. Loads torch."""

import os
import shlex
import shutil

import torch

from configs.schema.engines import SglangEngine
from configs.schema.rollout import SglangRollout
from configs.schema.run import RunConfig
from configs.schema.teacher import SglangTeacher
from kdflow_core.errors import ModelError

RANKS_PER_CORE = 4


def check_devices(run: RunConfig) -> None:
    """Refuse more ranks than this machine can hold, engines on GPUs that it does not have, and what
    cannot share one. Raises ModelError, which names the field.
    """
    if run.workers.type == "ray":
        return  # its machines are asked by themselves
    gpus = torch.cuda.device_count()
    most = gpus or max(8, RANKS_PER_CORE * (os.cpu_count() or 1))
    cores = f"{os.cpu_count()} cores and no GPU, for {most} ranks at most"
    what = f"{gpus} GPUs" if gpus else cores
    wanted = {"student.num_ranks": run.student.num_ranks}
    if run.teacher.type != "sglang_server":  # whose ranks only ask
        wanted["teacher.num_ranks"] = run.teacher.num_ranks
    if run.on_policy is not None:
        wanted["on_policy.rollout.num_engines"] = run.rollout_engines(gpus)
    for field, ranks in wanted.items():
        if ranks > most:
            raise ModelError(f"{field}={ranks}: this machine has {what}; lower it")
    if gpus:
        _check_compiler("training on a GPU, which compiles its loss,", "CC", ("gcc", "clang"))
        _check_gpus(run, gpus)
    else:
        check_without_gpus(run, "this machine has")
        if run.student.compile:
            _check_compiler("student.compile=true", "CXX", ("g++", "clang++"))


def check_without_gpus(run: RunConfig, who: str) -> None:
    """Refuse what engines do on GPUs alone, where `who` none; they would say so themselves, when
    others have run. Raises ModelError.
    """
    rollout = None if run.on_policy is None else run.on_policy.rollout
    if isinstance(rollout, SglangRollout) and rollout.sleep:
        raise ModelError(
            f"on_policy.rollout.sleep=true gives back the memory of a GPU, and {who} none; leave "
            "it out"
        )
    if isinstance(run.teacher, SglangTeacher) and run.teacher.expert_parallel > 1:
        raise ModelError(
            f"teacher.expert_parallel={run.teacher.expert_parallel}: SGLang computes experts on a "
            "CPU with all of them in each rank; set it to 1 (teacher.tensor_parallel splits each "
            "expert)"
        )


def _check_compiler(what: str, variable: str, names: tuple[str, ...]) -> None:
    """Refuse what ends when it is first compiled, after the teacher has run."""
    given = os.environ.get(variable)
    wanted = shlex.split(given)[:1] if given else names  # `ccache g++`, for instance
    if not any(shutil.which(name) for name in wanted):
        raise ModelError(
            f"{what} needs a compiler, and there is none of the name {given or ' or '.join(names)} "
            f"on the PATH; install {names[0]}, or set {variable} to the compiler that there is"
        )


def _check_gpus(run: RunConfig, gpus: int) -> None:
    teacher, answers = run.teacher, run.data.answers
    if run.teacher_in_training and isinstance(teacher, SglangTeacher) and teacher.deterministic:
        raise ModelError(
            "teacher.deterministic=true: on GPUs it changes the arithmetic of the whole process, "
            "and with this delivery the teacher is in the processes that train; set "
            "delivery=replay, or turn it off"
        )
    if answers is not None and isinstance(answers.engine, SglangEngine):
        _check_engine("data.answers.engine", answers.engine, run.answering_ranks, gpus)
    if run.on_policy is not None and isinstance(rollout := run.on_policy.rollout, SglangRollout):
        _check_engine("on_policy.rollout", rollout, run.rollout_engines(gpus), gpus)
        if rollout.weights == "broadcast" and rollout.first_gpu == 0:
            raise ModelError(
                "on_policy.rollout.weights=broadcast: engine and rank 0 of the student share GPU "
                "0, and NCCL takes a GPU once; set it to tensor, or on_policy.rollout.first_gpu to "
                f"one behind the student's (student.num_ranks={run.student.num_ranks})"
            )


def _check_engine(field: str, engine: SglangEngine, count: int, gpus: int) -> None:
    """Refuse GPUs that are not there to `count` engines side by side."""
    last = engine.first_gpu + count * engine.tensor_parallel - 1
    if last >= gpus:
        raise ModelError(
            f"{field}.first_gpu={engine.first_gpu} and tensor_parallel={engine.tensor_parallel}: "
            f"{count} of this engine take the GPUs {engine.first_gpu} to {last}, and this machine "
            f"has 0 to {gpus - 1}; lower one of them"
        )
