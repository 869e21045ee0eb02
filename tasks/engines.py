"""Whether what a run needs is installed, before any of it runs."""

from collections.abc import Mapping

from configs.errors import ConfigError
from configs.schema.run import RunConfig
from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime.versions import check_sglang
from tasks.stages import StageIdentity, open_store, run_of_teacher


def check_engines(run: RunConfig, plan: Mapping[str, StageIdentity]) -> None:
    """Refuse a run with a stage that has yet to run in SGLang, where there is none that we know.

    Raises ConfigError, which names the field.
    """
    store = open_store(run)
    for identity in plan.values():
        field = _sglang_field(run_of_teacher(run, identity.teacher), identity.stage)
        if field is None or store.find(identity.kind, identity.digest) is not None:
            continue
        try:
            check_sglang()
        except ModelError as error:
            raise ConfigError(f"{field}=sglang: {error}") from error


def _sglang_field(run: RunConfig, stage: str) -> str | None:
    """The field that has a stage run in SGLang."""
    if stage == "generate" and run.data.answers and run.data.answers.engine.type == "sglang":
        return "data.answers.engine.type"
    if stage == "train" and run.on_policy and run.on_policy.rollout.type == "sglang":
        return "on_policy.rollout.type"
    teaches = stage in {"extract", "estimate"} or (stage == "train" and run.teacher_in_training)
    return "teacher.type" if teaches and run.teacher.type == "sglang" else None
