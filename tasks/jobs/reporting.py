"""The job that writes the report. Loads no model library."""

from storage.artifact import ArtifactRef
from tasks.jobs.stage_run import StageRun, job
from tasks.presentation.report_page import write_report
from tasks.presentation.results import REPORT_FILE


@job("report")
def write_page(stage: StageRun) -> ArtifactRef:
    """The HTML report."""
    write_report(spec=stage.spec, store=stage.store, target=stage.workdir / REPORT_FILE)
    return stage.publish(counts={}, info={})
