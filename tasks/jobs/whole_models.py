"""Models that are loaded whole on one device, to be asked and scored."""

from pathlib import Path

from transformers import PreTrainedModel

from kdflow_core.models.loading import DTYPES, load_causal_lm
from tasks.jobs import parts
from tasks.jobs.reference import lacking_room
from tasks.jobs.stage_run import StageRun
from tasks.stages.slices import Side

TEACHERS_SHARE = 0.8  # of a device's free memory, for weights alone


def load_whole(stage: StageRun, side: Side, folder: Path) -> PreTrainedModel:
    """A side's model by transformers, with the student's kind of attention."""
    teacher, student = stage.run.teacher, stage.run.student
    return load_causal_lm(
        folder,
        dtype=DTYPES[teacher.dtype if side == "teacher" else student.compute_dtype],
        attention=student.attention,
        device=parts.device(stage),
        trust_remote_code=stage.trusts(side),
    )


def why_not_whole(stage: StageRun, folder: Path) -> str | None:
    """Why the teacher is not loaded whole on one device; None where it is."""
    teacher = stage.run.teacher
    if teacher.ranks_per_replica > 1:
        return f"one copy of it is spread over {teacher.ranks_per_replica} ranks"
    return lacking_room(folder, DTYPES[teacher.dtype], parts.device(stage), TEACHERS_SHARE)
