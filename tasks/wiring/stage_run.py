"""A stage at work: what all stages share."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from configs.schema.models import PretrainedModel
from kdflow_core.contracts import Example, OutputHead, Reporter
from kdflow_core.data.chat import ChatFormat
from kdflow_core.errors import AlignmentError
from kdflow_core.models.folders import context_length, resolve_folder
from kdflow_core.models.heads import head_digest, load_head
from kdflow_core.models.loading import load_config, load_tokenizer, true_vocabulary_size
from kdflow_core.rollout.base import Prompt
from storage.artifact import ArtifactRef, FileRecord
from storage.states.reader import HiddenStateReader
from storage.store import ArtifactStore
from storage.tokens import TokenTable
from tasks.adapters import StoredStates
from tasks.model_checks import chat_format, made_of
from tasks.slices import SPLITS, Split
from tasks.stages import StageSpec, open_store, spec_of_teacher

Side = Literal["teacher", "student"]
SIDES: tuple[Side, ...] = ("student", "teacher")


class StageRun:
    """A stage at work: its spec, store and reporter, and the commit at its end."""

    def __init__(self, spec: StageSpec, reporter: Reporter) -> None:
        self.spec = spec
        self.run = spec.run
        self.reporter = reporter
        self.store: ArtifactStore = open_store(spec.run)
        self.kind = spec.identity.kind
        self.digest = spec.identity.digest
        self._started = time.perf_counter()

    @property
    def workdir(self) -> Path:
        """The stage's local working folder; it survives a crash."""
        return self.store.workdir(self.kind, self.digest)

    def commit(
        self, *, files: Sequence[FileRecord], counts: Mapping[str, int], info: Mapping[str, Any]
    ) -> ArtifactRef:
        """Write the manifest."""
        return self.store.commit(
            kind=self.kind,
            digest=self.digest,
            code_version=self.spec.identity.code_version,
            config=self.spec.identity.config,
            inputs=self.spec.identity.inputs,
            files=files,
            counts=counts,
            info=info,
            seconds=time.perf_counter() - self._started,
        )

    def publish(self, *, counts: Mapping[str, int], info: Mapping[str, Any]) -> ArtifactRef:
        """Move the working folder's files into the artifact, then commit."""
        files = self.store.publish(self.kind, self.digest, self.workdir)
        return self.commit(files=files, counts=counts, info=info)

    def model_folder(self, side: Side) -> Path:
        """The local folder of the teacher's or the (untrained) student's model."""
        prepared = self.spec.inputs.get(f"{side}_model")
        if prepared is not None:
            return self.store.local_copy(prepared)
        model = self.run.teacher.model if side == "teacher" else self.run.student.model
        assert isinstance(model, PretrainedModel)
        return resolve_folder(model.path, model.revision)

    def trusts(self, side: Side) -> bool:
        """Whether Python files that a side's model brings along may run."""
        return made_of(self.run, side).trust_remote_code

    def tokenizer(self, side: Side) -> PreTrainedTokenizerBase:
        """The tokenizer of a side's model."""
        return load_tokenizer(self.model_folder(side), trust_remote_code=self.trusts(side))

    def chat(self, side: Side) -> ChatFormat:
        """How a side's model is spoken to, and how it ends its turns."""
        return chat_format(self.run, side, self.model_folder(side))

    def prompt(self, example: Example, side: Side, most: int) -> Prompt:
        """What a side's model is asked, with room for up to `most` tokens that both sides can hold.

        The data's own answer fits, so there is room for one at least.
        """
        longest = max(len(one.context_ids_T) for one in (example.student, example.teacher))
        sequence = example.teacher if side == "teacher" else example.student
        room = self.length_limit - longest
        return Prompt(ids_T=sequence.context_ids_T, max_new_tokens=min(most, room))

    @cached_property
    def length_limit(self) -> int:
        """The longest text that the run allows and both models hold, in tokens."""
        own = (context_length(self.model_folder(side)) for side in SIDES)
        return min(self.run.data.max_length, *own)

    def tables(self) -> dict[Split, TokenTable]:
        """The token tables by split, with the answers in place that a model wrote."""
        name = "answers" if "answers" in self.spec.inputs else "tokens"
        folder = self.store.local_copy(self.spec.inputs[name])
        return {split: TokenTable(folder / f"{split}.arrow") for split in SPLITS}

    def of_teacher(self, name: str) -> "StageRun":
        """This stage as one of several teachers has it: with its model and its states."""
        return StageRun(spec_of_teacher(self.spec, name), self.reporter)

    def teacher_signal(self, device: torch.device) -> tuple[StoredStates, OutputHead]:
        """The teacher's stored states, and the head that they were made for.

        Raises AlignmentError when the teacher's checkpoint has another head by now.
        """
        ref = self.spec.inputs["states"]
        head = self.teacher_head(device)
        recorded = self.store.manifest(ref.kind, ref.digest).info["head"]["digest"]
        if head_digest(head) != recorded:
            raise AlignmentError(
                "the teacher's output head is not the one that its stored states were made for; "
                f"delete {ref.uri} and run again"
            )
        limit = int(self.run.storage.read_cache_gb * 1e9)
        reader = HiddenStateReader(store=self.store, ref=ref, cache_bytes=limit)
        return StoredStates(reader), head

    def teacher_head(self, device: torch.device) -> OutputHead:
        """The teacher's output head over the true vocabulary."""
        folder = self.model_folder("teacher")
        config = load_config(folder, trust_remote_code=self.trusts("teacher"))
        head = load_head(folder, config, true_vocabulary_size(self.tokenizer("teacher")))
        return OutputHead(
            weight_VH=head.weight_VH.to(device),
            bias_V=None if head.bias_V is None else head.bias_V.to(device),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        )


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def default_device() -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("KDFLOW_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
