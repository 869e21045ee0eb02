"""What identifies the benchmarks of a model."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.schema.eval import LmEvalConfig
from configs.schema.teacher import SglangTeacher
from kdflow_core.errors import DataError
from storage.digest import digest
from storage.fingerprint import Fingerprints
from tasks.stages.slices import Known, Slice

FIELD = "eval.lm_eval"
OPERATIONAL = {"batch_size", "tasks_folder"}  # the folder counts by its files


def teacher_benchmarks(known: Known) -> Iterator[Slice]:
    """Those of the run's teacher."""
    config, run = known.run.eval.lm_eval, known.run
    if config is not None:
        inputs = {"teacher_model": known.teacher_model()} | _own_tasks(config, known.prints)
        fields = _config(config, run.teacher.dtype, run.teacher.chat_template)
        if isinstance(run.teacher, SglangTeacher):  # which is asked by its own engine
            fields["engine"] = run.teacher.model_dump(
                mode="json", include={"type", "quantization", "attention_backend"}
            )
        yield Slice(config=fields, inputs=inputs)


def student_benchmarks(known: Known) -> Iterator[Slice]:
    """Those of the trained student, who has its chat template with it."""
    config, run = known.run.eval.lm_eval, known.run
    student = known.made("student")
    if config is not None and student is not None:
        inputs = {"student": student} | _own_tasks(config, known.prints)
        yield Slice(config=_config(config, run.student.compute_dtype, None), inputs=inputs)


def _config(config: LmEvalConfig, dtype: str, template: Any) -> dict[str, Any]:
    fields = config.model_dump(mode="json", exclude=OPERATIONAL)
    if config.chat_template and template is not None:
        fields["template"] = template.model_dump(mode="json")
    try:
        fields["version"] = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise DataError(
            f"{FIELD} needs the package lm_eval: pip install lm_eval, or leave the field out"
        ) from None
    return fields | {"dtype": dtype}


def _own_tasks(config: LmEvalConfig, prints: Fingerprints) -> dict[str, str]:
    """The files of one's own tasks, as an input. Raises DataError where there are none."""
    if config.tasks_folder is None:
        return {}
    folder = Path(config.tasks_folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(path.suffix == ".yaml" for path in files):
        raise DataError(f"{FIELD}.tasks_folder: there is no YAML file in {folder}")
    return {"tasks": digest({str(f.relative_to(folder)): prints.file(f) for f in files})}
