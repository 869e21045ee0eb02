"""The parts of a run as the core takes them: models' tokenizers, heads, stored signals, prompts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdflow_core.contracts import Example, OutputHead, TeacherAtHand
from kdflow_core.errors import AlignmentError
from kdflow_core.models.heads import head_digest, load_head
from kdflow_core.models.loading import load_config
from kdflow_core.models.tokenizers import true_vocabulary_size
from kdflow_core.rollout.base import Prompt
from kdflow_core.workers.devices import device_of, join_group
from storage.artifact import ArtifactRef
from storage.states.reader import HiddenStateReader
from storage.tokens import TokenTable
from tasks.jobs.chats import tokenizer
from tasks.jobs.stage_run import StageRun
from tasks.jobs.stored import StoredStates
from tasks.stages.slices import Side

T = TypeVar("T")


def device(stage: StageRun) -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    return device_of(stage.context)


def join(stage: StageRun) -> None:
    """Meet the other ranks of the stage, where it was launched as such."""
    if stage.context.rendezvous and not dist.is_initialized():
        join_group(stage.context)


def prompt(stage: StageRun, example: Example, side: Side, most: int) -> Prompt:
    """The prompt for a side's model, with room for up to `most` answer tokens that both sides can
    hold.

    The data's own answer fits, so there is room for one at least.
    """
    longest = max(len(one.context_ids_T) for one in (example.student, example.teacher))
    sequence = example.teacher if side == "teacher" else example.student
    room = stage.length_limit - longest
    return Prompt(ids_T=sequence.context_ids_T, max_new_tokens=min(most, room))


def view_of(table: TokenTable, name: str) -> str:
    """The view of the samples that one of the teachers reads."""
    return name if name in table.views else "teacher"


def stored_teacher(stage: StageRun, view: str = "teacher") -> TeacherAtHand[StoredStates]:
    """The teacher by its stored states, which it has of a view.

    Raises AlignmentError when its checkpoint has another head by now.
    """
    ref = stage.spec.inputs["states"]
    head = teacher_head(stage, device(stage))
    recorded = stage.store.manifest(ref.kind, ref.digest).info["head"]["digest"]
    if head_digest(head) != recorded:
        raise AlignmentError(
            "the teacher's output head is not the one that its stored states were made for; "
            f"delete {ref.uri} and run again"
        )
    return TeacherAtHand(StoredStates(open_states(stage, ref)), head, view)


def open_states(stage: StageRun, ref: ArtifactRef) -> HiddenStateReader:
    """An artifact of hidden states, with the run's cache of what is remote."""
    limit = int(stage.run.storage.read_cache_gb * 1e9)
    return HiddenStateReader(store=stage.store, ref=ref, cache_bytes=limit)


def teacher_head(stage: StageRun, where: torch.device) -> OutputHead:
    """The teacher's output head over the true vocabulary."""
    folder = stage.model_folder("teacher")
    config = load_config(folder, trust_remote_code=stage.trusts("teacher"))
    head = load_head(folder, config, true_vocabulary_size(tokenizer(stage, "teacher")))
    bias_V = None if head.bias_V is None else head.bias_V.to(where)
    return replace(head, weight_VH=head.weight_VH.to(where), bias_V=bias_V)


def agreed(find: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks."""
    rank, _ = rank_and_size()
    found: list[Any] = [find() if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    answer: T = found[0]
    return answer


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
