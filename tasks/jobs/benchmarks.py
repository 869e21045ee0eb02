"""The jobs that ask teacher and student the questions of benchmarks."""

import json
from pathlib import Path
from typing import Any

from configs.schema.eval import LmEvalConfig
from configs.schema.teacher import SglangTeacher
from storage.artifact import ArtifactRef
from tasks.checks.chat_check import chat_format
from tasks.jobs import parts
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.whole_models import load_model, why_no_answers, why_no_teacher
from tasks.presentation.results import BENCHMARKS_FILE
from tasks.stages.slices import Side


@job("lm-eval-teacher")
def benchmark_teacher(stage: StageRun) -> ArtifactRef | None:
    """Ask the teacher: by SGLang where that serves it, on all ranks of a copy; else where it is
    loaded whole, by transformers.
    """
    teacher, folder = stage.run.teacher, stage.model_folder("teacher")
    if isinstance(teacher, SglangTeacher):
        parts.join(stage)
        rank, _ = parts.rank_and_size()
        records = _asked_by_engine(stage, teacher, folder)
        return _publish(stage, records) if rank == 0 else None
    reason = why_no_teacher(stage, folder)
    if reason is None:
        return _publish(stage, _asked(stage, "teacher", folder))
    return _publish(stage, _unasked(stage, "teacher", reason))


@job("lm-eval")
def benchmark_student(stage: StageRun) -> ArtifactRef:
    """Ask the trained student."""
    folder = stage.store.local_copy(stage.spec.inputs["student"]) / "model"
    return _publish(stage, _asked(stage, "student", folder))


def _asked(stage: StageRun, side: Side, folder: Path) -> list[dict[str, Any]]:
    from kdflow_core.eval import harness  # noqa: PLC0415 - loads a package that need not be there

    config = _config(stage)
    manager = harness.task_manager(config)
    loaded = load_model(stage, side, folder)
    if (reason := why_no_answers(loaded)) is not None:
        return _unasked(stage, side, reason)
    model = harness.ReportingModel(
        loaded,
        chat_format(stage.run, side, folder).tokenizer,
        batch_size=config.batch_size,
        reporter=stage.reporter,
        title=side,
    )
    return harness.run_tasks(config, manager, model)


def _asked_by_engine(stage: StageRun, teacher: SglangTeacher, folder: Path) -> list[dict[str, Any]]:
    from kdflow_core.eval import engine_lm, harness  # noqa: PLC0415 - loads a package, see above
    from tasks.jobs.asked_teacher import AskedTeacher  # noqa: PLC0415 - loads SGLang

    config = _config(stage)
    manager = harness.task_manager(config)
    asked = AskedTeacher(stage, teacher)
    chat = chat_format(stage.run, "teacher", folder)
    model = engine_lm.EngineModel(asked, chat, reporter=stage.reporter, title="teacher")
    try:
        return harness.run_tasks(config, manager, model)
    finally:
        asked.close()


def _unasked(stage: StageRun, side: Side, reason: str) -> list[dict[str, Any]]:
    stage.reporter.message(f"the {side} is asked no benchmarks: {reason}")
    return []


def _config(stage: StageRun) -> LmEvalConfig:
    config = stage.run.eval.lm_eval
    assert isinstance(config, LmEvalConfig)
    return config


def _publish(stage: StageRun, records: list[dict[str, Any]]) -> ArtifactRef:
    path = stage.workdir / BENCHMARKS_FILE
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return stage.publish(counts={"metrics": len(records)}, info={})
