"""What can be known before a run starts, checked before it starts.

A model that passed is not checked again for the same use, so a run that comes from cache loads no
model library.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from configs.load import load_run
from configs.schema.models import PretrainedModel
from configs.schema.run import RunConfig
from configs.schema.workers import RayWorkers
from configs.secrets import public
from kdflow_core.errors import ModelError, WorkerError
from kdflow_core.models.folders import resolve_folder
from kdflow_core.sglang_runtime.versions import sglang_version
from kdflow_core.workers.forking import can_fork
from storage.artifact import ArtifactRef
from storage.digest import digest
from storage.fingerprint import file_state
from storage.memo import Memo
from storage.places import check_places, check_writable
from tasks.checks.cluster_check import check_cluster
from tasks.checks.engine_check import check_engines
from tasks.checks.function_check import check_functions
from tasks.checks.start import started
from tasks.execution.launch import ask_rank
from tasks.presentation.trackers import check_tracking
from tasks.stages.identity import StageIdentity, find, open_store, run_of_teacher
from tasks.stages.planning import plan_stages

CHECKED = "checked-models.sqlite"
CHECKER = "tasks.jobs.model_checking:ModelChecking"
# What of a run says how its models are used.
CHECKED_SECTIONS = {
    "data", "delivery", "teacher", "student", "algorithm", "loss", "alignment", "on_policy",
    "workers",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that was checked, and its stages by name: made once, and handed on."""

    run: RunConfig
    stages: dict[str, StageIdentity]


def planned_run(recipe: str, overrides: dict[str, Any], *, download: bool) -> PlannedRun:
    """A recipe with overrides, checked and planned; see `checked_plan`."""
    run = checked_run(recipe, overrides)
    return PlannedRun(run=run, stages=checked_plan(run, download=download))


def checked_run(recipe: str, overrides: dict[str, Any]) -> RunConfig:
    """Load and validate a run, with the model that its student begins with. Raises ConfigError, and
    with `student.start: latest` what planning raises.

    Whether its data and models are there is seen by planning its stages.
    """
    run = load_run(recipe, overrides)
    check_tracking(run)
    return started(run)


def checked_plan(run: RunConfig, *, download: bool) -> dict[str, StageIdentity]:
    """The stages of a run (see `plan_stages`), after its models and engines have been checked.

    Without `download`, the weights of a hub model that is not here yet are left out, and servers
    are not asked for.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    store = open_store(run)
    check_places(store)
    given = _given(run, download=download)
    _check(run, given)
    plan = plan_stages(run)
    check_functions(run)
    check_engines(run, plan, ask_servers=download)
    lacking = [identity for identity in plan.values() if find(run, identity) is None]
    if lacking:
        check_writable(store)
    prepared = _prepared(run, plan)
    if lacking and isinstance(run.workers, RayWorkers):
        check_cluster(run, lacking, given | prepared)
    if prepared:
        _check(run, given | prepared)
    return plan


def all_artifacts(planned: PlannedRun) -> dict[str, ArtifactRef] | None:
    """The artifacts of a run by output name, when nothing is left to be run."""
    if planned.run.delivery == "auto":  # the stages after the estimate are not planned yet
        return None
    found = {i.output: find(planned.run, i) for i in planned.stages.values()}
    there = {output: ref for output, ref in found.items() if ref is not None}
    return there if len(there) == len(found) else None


def models_are_checked(run: RunConfig) -> bool:
    """Whether planning can do without looking at models, as far as they are here."""
    folders = _given(run, download=False)
    return not folders or _memo(run).get(_key(run, folders)) is not None


def _given(run: RunConfig, *, download: bool) -> dict[str, Path]:
    """The folders of the models that are Hugging Face folders."""
    models = {n: run_of_teacher(run, n).teacher.model for n in run.teacher_names}
    folders = {}
    for name, model in (models | {"student": run.student.model}).items():
        if not isinstance(model, PretrainedModel):
            continue
        folder = resolve_folder(model.path, model.revision, weights=download)
        if Path(model.path).is_dir() or any(folder.glob("*.safetensors")):
            folders[name] = folder
    return folders


def _prepared(run: RunConfig, plan: Mapping[str, StageIdentity]) -> dict[str, Path]:
    """The folders of models that stages have made already."""
    store, folders = open_store(run), {}
    for identity in plan.values():
        if identity.kind != "model":
            continue
        ref = store.find(identity.kind, identity.digest)
        if ref is not None:
            name = "student" if identity.stage == "prepare-student" else identity.teacher
            folders[name] = store.local_copy(ref)
    return folders


def _memo(run: RunConfig) -> Memo:
    return Memo(Path(run.storage.scratch) / CHECKED)


def _key(run: RunConfig, folders: Mapping[str, Path]) -> str:
    """What models are checked for: these very files, for this very run, on these devices."""
    gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    memory = psutil.virtual_memory().total
    return digest(
        {
            "devices": [os.cpu_count(), os.environ.get("CUDA_VISIBLE_DEVICES"), memory, *gpus],
            "versions": [version("transformers"), version("kdflow"), sglang_version()],
            "files": {name: _states(folder) for name, folder in sorted(folders.items())},
            "run": public(run.model_dump(mode="json", include=CHECKED_SECTIONS)),
        }
    )


def _check(run: RunConfig, folders: Mapping[str, Path]) -> None:
    """Check the models, unless they have passed."""
    memo, key = _memo(run), _key(run, folders)
    if not folders or memo.get(key) is not None:
        return
    if "torch" not in sys.modules and can_fork():
        _check_in_rank(run, folders)
    else:
        from tasks.checks.model_check import check_folders  # noqa: PLC0415 - loads torch

        check_folders(run, folders)
    memo.put(key, "in order")


def _check_in_rank(run: RunConfig, folders: Mapping[str, Path]) -> None:
    """Check the models where the libraries will be loaded for the stages anyway."""
    paths = {name: str(folder) for name, folder in folders.items()}
    try:
        ask_rank("check of the models", CHECKER, run.model_dump_json(), "check", folders=paths)
    except WorkerError as error:
        if not error.expected:
            raise
        raise ModelError(str(error)) from error


def _states(folder: Path) -> dict[str, str]:
    """What changes when a file of a model's folder does; of another folder, nothing is asked."""
    if not (folder / "config.json").is_file():
        return {}
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    files = sorted(path for path in paths if path.is_file())
    return {path.relative_to(folder).as_posix(): file_state(path) for path in files}
