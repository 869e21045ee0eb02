"""Models that are loaded to be asked and scored."""

import gc
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kdflow_core.models.loading import DTYPES, load_causal_lm
from kdflow_core.models.spread import comes_in_parts, spread_
from tasks.jobs import parts
from tasks.jobs.reference import free_bytes, lacking_room
from tasks.jobs.stage_run import StageRun
from tasks.stages.slices import Side

SHARE = 0.8  # of a device's free memory, for weights alone


def load_model(stage: StageRun, side: Side, folder: Path) -> PreTrainedModel:
    """A side's model by transformers, with the student's kind of attention: on this rank's device
    or, where it does not fit there, over all GPUs, and in the host's memory what these do not hold.
    """
    dtype, device = _dtype(stage, side), parts.device(stage)
    gc.collect()  # an earlier model
    lacking = lacking_room(folder, dtype, device, SHARE)
    rooms = [] if lacking is None else _rooms(device)
    model = load_causal_lm(
        folder,
        dtype=dtype,
        attention=stage.run.student.attention,
        device=None if rooms else device,
        trust_remote_code=stage.trusts(side),
    )
    if rooms:
        places = spread_(model, rooms)
        coming = sum(place.comes for place in places)
        stage.reporter.message(
            f"the {side} is spread over {len(rooms)} GPUs, with {coming} of its {len(places)} "
            f"layers in the host's memory: {lacking}"
        )
    return model


def why_no_teacher(stage: StageRun, folder: Path) -> str | None:
    """Why the teacher is not loaded; None where it is."""
    teacher = stage.run.teacher
    if teacher.ranks_per_replica > 1:
        return f"one copy of it is spread over {teacher.ranks_per_replica} ranks"
    return lacking_room(folder, _dtype(stage, "teacher"), parts.device(stage), SHARE)


def why_no_answers(model: PreTrainedModel) -> str | None:
    """Why a model is not asked for what takes many forward passes; None where it is."""
    if comes_in_parts(model):
        return "layers of it come from the host's memory for each forward pass"
    return None


def _dtype(stage: StageRun, side: Side) -> torch.dtype:
    run = stage.run
    return DTYPES[run.teacher.dtype if side == "teacher" else run.student.compute_dtype]


def _rooms(device: torch.device) -> list[tuple[torch.device, int]]:
    """What each GPU has room for, in bytes, this rank's first; none where there are none."""
    if device.type != "cuda":
        return []
    others = {torch.device("cuda", k) for k in range(torch.cuda.device_count())} - {device}
    return [
        (own, int(SHARE * free_bytes(own)))
        for own in (device, *sorted(others, key=lambda other: other.index))
    ]
