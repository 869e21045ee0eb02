"""Checkpoints of weights and optimizer with torch.distributed.checkpoint.

A checkpoint is complete when its folder has its final name: it is written under a temporary name,
every rank adds the checksums of its files, and rank 0 renames it after all ranks are done. The rest
of the training state (data order, learning rate, random numbers) is a function of the step.

torch keeps what belongs where in a pickle, so a checkpoint runs code of whoever can write to it:
keep the scratch folder to yourself. Nothing is unpickled before all checksums are right, and
nothing but tensors and their descriptions then.
"""

import io
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from kdflow_core.errors import TrainingError
from kdflow_core.student.seal import METADATA, damage_of, write_seal
from kdflow_core.waiting import PATIENCE

NAME = re.compile(r"^step-(\d{8})$")
STUDENT = "model."  # of a DistillationModule
LITTLE_ROOM = 1 << 26  # bytes; a disk with less is taken for full when writing fails
# What the metadata of a checkpoint may be made of.
METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
METADATA_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._C", "layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    ("pathlib._local", "PurePosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
}


def completed_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := NAME.match(p.name)))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


class CheckpointCopies(Protocol):
    """Copies of checkpoints elsewhere. What cannot be copied is said, in words, and no error: the
    checkpoint itself is there.
    """

    def put(self, checkpoint: Path, names: Sequence[str]) -> str | None:
        """Copy a rank's files of a checkpoint's folder."""
        ...

    def complete(self, checkpoint: Path) -> str | None:
        """All ranks have put theirs: the copy counts, and of all others those whose checkpoints
        are still beside this one. Rank 0's.
        """
        ...


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and keeps the newest `keep` and the one
    of the step that is `held`; and `copies`, of whose problems `tell` is told.

    What is saved of a GPU is copied to host memory first, so that training may go on; on a CPU,
    where the copy would take as much memory again, training waits until it is written, and goes on
    beside its checksums and copies. Every rank makes one and calls its methods together with the
    others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        copies: CheckpointCopies | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._copies = copies
        self._tell = tell
        self.held: int | None = None
        # Of its own, as the writing ranks talk while the training ones do.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None

    def save(
        self, step: int, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Save what is there after `step` optimizer steps. It counts once it is whole on the disk;
        `wait` waits for that. Raises what has gone wrong with the one before, TrainingError where
        the disk is full.
        """
        self.wait()
        temporary = self._folder / f"step-{step:08d}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        weights, optimizer_state = get_state_dict(module, optimizers)
        state = {"model": _moving(weights, module), "optimizer": optimizer_state}
        place, group = str(temporary), self._group
        if next(module.parameters()).device.type == "cpu":
            written: Any = self._pool.submit(save, state, checkpoint_id=place, process_group=group)
            wait([written])
        else:
            written = async_save(state, checkpoint_id=place, process_group=group)
        self._pending = self._pool.submit(self._finish, written, temporary, step, self.held)

    def _finish(self, written: Any, temporary: Path, step: int, held: int | None) -> str | None:
        """Rank 0's is done when all ranks have written; it says what is wrong with the copy."""
        rank = dist.get_rank()
        written.result()
        names = write_seal(temporary, rank=rank, ranks=dist.get_world_size())
        dist.barrier(group=self._group)
        if rank == 0:
            temporary.rename(step_folder(self._folder, step))
            for old in completed_steps(self._folder)[: -self._keep]:
                if old != held:
                    shutil.rmtree(step_folder(self._folder, old))
        return None if self._copies is None else self._copy(self._copies, step, names)

    def _copy(self, copies: CheckpointCopies, step: int, names: Sequence[str]) -> str | None:
        """Copy a checkpoint that is whole; each rank what it has written."""
        dist.barrier(group=self._group)  # it has its name by now
        problems: list[str | None] = [None] * dist.get_world_size()
        folder = step_folder(self._folder, step)
        dist.all_gather_object(problems, copies.put(folder, names), group=self._group)
        if dist.get_rank() != 0:
            return None
        problem = next((text for text in problems if text), None) or copies.complete(folder)
        return None if problem is None else f"the checkpoint of step {step} has no copy: {problem}"

    def wait(self) -> None:
        """Until what was saved is on the disk. See `save` for what it raises."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            problem = pending.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            if shutil.disk_usage(self._folder).free > LITTLE_ROOM:
                raise RuntimeError(f"cannot write a checkpoint: {error}") from error
            raise TrainingError(
                f"no room left for a checkpoint in {self._folder}; the ones before stay: make room "
                "or set storage.scratch to a larger disk, and run again"
            ) from error
        if problem is not None:
            self._tell(problem)


def load_newest(
    folder: Path,
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tell: Callable[[str], None],
) -> int:
    """Load the newest complete checkpoint that is whole, if any; the number of steps done (0
    without one). Damaged ones are set aside, of which `tell` is told.
    """
    step = _newest_whole(folder, tell)
    if step == 0:
        return 0
    weights, optimizer_state = get_state_dict(module, optimizers)
    state: dict[str, Any] = {"model": _moving(weights, module), "optimizer": optimizer_state}
    load(state, checkpoint_id=str(step_folder(folder, step)), planner=_PlainLoadPlanner())
    set_state_dict(
        module,
        optimizers,
        model_state_dict=weights | state["model"],
        optim_state_dict=state["optimizer"],
    )
    return step


def load_weights(folder: Path, step: int, module: torch.nn.Module) -> None:
    """Load the weights alone of the complete checkpoint of a step, which this training has written
    or found whole.
    """
    weights = get_model_state_dict(module)
    state: dict[str, Any] = {"model": _moving(weights, module)}
    load(state, checkpoint_id=str(step_folder(folder, step)), planner=_PlainLoadPlanner())
    set_model_state_dict(module, weights | state["model"])


def _moving(weights: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """Of a module's weights those that training changes: all but the student's frozen ones.

    What an algorithm averages has no gradient either, and moves.
    """
    named = module.named_parameters(remove_duplicate=False)
    frozen = {n for n, p in named if n.startswith(STUDENT) and not p.requires_grad}
    return {name: weight for name, weight in weights.items() if name not in frozen}


def _newest_whole(folder: Path, tell: Callable[[str], None]) -> int:
    """Every rank looks at its share of the files; they agree on one checkpoint."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in reversed(completed_steps(folder)):
        path = step_folder(folder, step)
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, damage_of(path, rank=rank, ranks=ranks) or _refused(path))
        damage = next((text for text in found if text), None)
        if damage is None:
            return step
        tell(f"the checkpoint of step {step} is damaged ({damage}); trying the one before")
        if rank == 0:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        dist.barrier()
    return 0


def _refused(path: Path) -> str | None:
    """What is wrong with the metadata of a checkpoint, found out without running it."""
    try:
        _DescriptionsOnly(io.BytesIO((path / METADATA).read_bytes())).load()
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError) as error:
        return f"{METADATA}: {error}"
    return None


class _DescriptionsOnly(pickle.Unpickler):
    """Refuses everything but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        described = module in METADATA_MODULES and "." not in name
        if not (dtype or described or (module, name) in METADATA_NAMES):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint of ours has"
            )
        return super().find_class(module, name)


class _PlainLoadPlanner(DefaultLoadPlanner):
    """Reads what is not a tensor (steps, learning rates) as plain values, never as a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See `LoadPlanner`."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
