"""The composition root: what each stage does, from config and references to an artifact.

The only modules that see both the core and the store. They run inside worker processes and know
nothing of Prefect. `STAGES` is the catalogue.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from storage.artifact import ArtifactRef
from tasks.wiring.estimation import estimate_run
from tasks.wiring.evaluation import evaluate_student, report
from tasks.wiring.extraction import extract_states
from tasks.wiring.generation import generate_answers
from tasks.wiring.preparation import prepare_model, tokenize_data
from tasks.wiring.stage_run import StageRun
from tasks.wiring.training import train_student

STAGES: Mapping[str, Callable[[StageRun], ArtifactRef | None]] = MappingProxyType(
    {
        "prepare-teacher": prepare_model,
        "prepare-student": prepare_model,
        "tokenize": tokenize_data,
        "generate": generate_answers,
        "estimate": estimate_run,
        "extract": extract_states,
        "train": train_student,
        "evaluate": evaluate_student,
        "report": report,
    }
)
