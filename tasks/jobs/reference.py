"""A safety net for loading a teacher: its first states are compared with those that transformers
computes from the same folder.
"""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from configs.schema.teacher import Teacher
from kdflow_core.contracts import TeacherEngine, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.eval.distribution import relative_difference
from kdflow_core.models.checkpoints import read_checkpoint
from kdflow_core.models.forward import post_norm_states
from kdflow_core.models.loading import DTYPES, load_causal_lm, load_config
from tasks.jobs.stage_run import StageRun

# Medians of |own - reference| / |reference|: rounding to bfloat16 makes about 0.02 through 60
# layers, weights of 4 bits up to 0.25, other weights about 1.
LIMIT, QUANTIZED_LIMIT = 0.15, 0.4
COMPARED = 2
LONGEST = 512
MEMORY_SHARE = 0.5


def state_limit(teacher: Teacher) -> float:
    """How far a teacher's states may be from transformers' own, as a median relative difference."""
    quantized = getattr(teacher, "quantization", None) is not None
    return QUANTIZED_LIMIT if quantized else LIMIT


def lacking_room(
    folder: Path, dtype: torch.dtype, device: torch.device, share: float
) -> str | None:
    """Why weights do not fit a share of what a device has free; None where they do."""
    needed, free = read_checkpoint(folder).num_parameters * dtype.itemsize, free_bytes(device)
    if needed <= free * share:
        return None
    room = free * share / 1e9
    return f"it takes {needed / 1e9:.1f} GB, and {room:.1f} GB of memory are to spare"


def free_bytes(device: torch.device) -> int:
    """What a device has free, with what this process has there and does not use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


class Reference:
    """The states of a few sequences by transformers, on the CPU; `None` of them where the model
    does not fit there, which is said once.
    """

    def __init__(self, stage: StageRun, sequences: Sequence[TokenSequence]) -> None:
        self._stage = stage
        short = sorted(sequences, key=lambda s: len(s.ids_T))
        self.sequences = [s for s in short if s.supervised_T.any()][:COMPARED]
        self._states: list[torch.Tensor] | None = None

    def compute(self) -> None:
        """Load the model, run it, and let go of it."""
        teacher, folder = self._stage.run.teacher, self._stage.model_folder("teacher")
        trust = self._stage.trusts("teacher")
        dtype = DTYPES[teacher.dtype]
        reason = self._why_not(dtype)
        if reason is not None:
            self._stage.reporter.message(
                f"the teacher's states are not compared with transformers' own: {reason}"
            )
            return
        model = load_causal_lm(folder, dtype=dtype, attention="eager", trust_remote_code=trust)
        self._states = []
        with torch.inference_mode():
            for sequence in self.sequences:
                ids_BT = torch.from_numpy(sequence.ids_T[:LONGEST].astype("int64"))[None]
                hidden_BTH = post_norm_states(model.base_model, ids_BT)
                self._states.append(hidden_BTH[0, _rows(sequence)].float())

    def _why_not(self, dtype: torch.dtype) -> str | None:
        folder, trust = self._stage.model_folder("teacher"), self._stage.trusts("teacher")
        config = load_config(folder, trust_remote_code=trust)
        if getattr(config, "quantization_config", None) is not None:
            return "its checkpoint is quantized"
        return lacking_room(folder, dtype, torch.device("cpu"), MEMORY_SHARE)

    def compare(self, engine: TeacherEngine) -> None:
        """Run the same sequences in the engine; every rank of its replica calls this.

        Raises ModelError where the states are far apart.
        """
        if not self.sequences:
            return
        rows = engine.forward(self.sequences)
        if self._states is None:
            return
        differences = []
        for sequence, part, reference_NH in zip(self.sequences, rows, self._states, strict=True):
            count = len(_rows(sequence))
            own_NH = part.buffer_RH[part.index_N][:count].float().cpu()
            differences.append(relative_difference(own_NH, reference_NH))
        difference = float(torch.cat(differences).median())
        limit = state_limit(self._stage.run.teacher)
        if not difference < limit:
            raise ModelError(
                f"the states that teacher.type={self._stage.run.teacher.type} gives are far from "
                f"transformers' own (median relative difference {difference:.2f}, limit {limit}): "
                f"it has not read the weights in {self._stage.model_folder('teacher')} as they "
                "are; set teacher.type=transformers, or mend the checkpoint"
            )


def _rows(sequence: TokenSequence) -> torch.Tensor:
    """The rows that predict supervised tokens, of those that are computed."""
    positions_N = sequence.target_positions_N - 1
    return torch.from_numpy(positions_N[positions_N < min(len(sequence.ids_T), LONGEST)])
