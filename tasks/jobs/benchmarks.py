"""The jobs that ask teacher and student the questions of benchmarks."""

import json
from pathlib import Path
from typing import Any

from configs.schema.eval import LmEvalConfig
from storage.artifact import ArtifactRef
from tasks.checks.chat_check import chat_format
from tasks.jobs.stage_run import StageRun, job
from tasks.jobs.whole_models import load_whole, why_not_whole
from tasks.presentation.results import BENCHMARKS_FILE
from tasks.stages.slices import Side


@job("lm-eval-teacher")
def benchmark_teacher(stage: StageRun) -> ArtifactRef:
    """Ask the teacher, where it is loaded whole."""
    folder = stage.model_folder("teacher")
    reason = why_not_whole(stage, folder)
    if reason is None:
        return _publish(stage, _asked(stage, "teacher", folder))
    stage.reporter.message(f"the teacher is asked no benchmarks: {reason}")
    return _publish(stage, [])


@job("lm-eval")
def benchmark_student(stage: StageRun) -> ArtifactRef:
    """Ask the trained student."""
    folder = stage.store.local_copy(stage.spec.inputs["student"]) / "model"
    return _publish(stage, _asked(stage, "student", folder))


def _asked(stage: StageRun, side: Side, folder: Path) -> list[dict[str, Any]]:
    from kdflow_core.eval import harness  # noqa: PLC0415 - loads a package that need not be there

    config = stage.run.eval.lm_eval
    assert isinstance(config, LmEvalConfig)
    manager = harness.task_manager(config)
    model = harness.ReportingModel(
        load_whole(stage, side, folder),
        chat_format(stage.run, side, folder).tokenizer,
        batch_size=config.batch_size,
        reporter=stage.reporter,
        title=side,
    )
    return harness.run_tasks(config, manager, model)


def _publish(stage: StageRun, records: list[dict[str, Any]]) -> ArtifactRef:
    path = stage.workdir / BENCHMARKS_FILE
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return stage.publish(counts={"metrics": len(records)}, info={})
