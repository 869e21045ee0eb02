"""Whether what a run needs is installed, before any of it runs."""

from collections.abc import Mapping

import httpx

from configs.errors import ConfigError
from configs.schema.generation import Engine, SglangEngine
from configs.schema.rollout import Rollout
from configs.schema.run import RunConfig
from configs.schema.teacher import SglangServerTeacher, SglangTeacher, Teacher
from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime.versions import check_names, check_sglang
from tasks.stages import StageIdentity, open_store, run_of_teacher

ANSWER_S = 10.0


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
            _check_names(run_of_teacher(run, identity.teacher), field)
        except ModelError as error:
            raise ConfigError(f"{field}=sglang: {error}") from error


def _check_names(run: RunConfig, field: str) -> None:
    """SGLang's own names in the section that the field is in. Raises ModelError."""
    answers, on_policy = run.data.answers, run.on_policy
    part: Teacher | Engine | Rollout | None = run.teacher
    if field.startswith("data."):
        part = None if answers is None else answers.engine
    elif field.startswith("on_policy."):
        part = None if on_policy is None else on_policy.rollout
    if isinstance(part, SglangTeacher):
        check_names(attention_backend=part.attention_backend, quantization=part.quantization)
    elif isinstance(part, SglangEngine):
        check_names(attention_backend=part.attention_backend, quantization=None)


def check_servers(run: RunConfig, plan: Mapping[str, StageIdentity]) -> None:
    """Refuse a run with a stage that has yet to ask a server which is not there.

    Raises ConfigError.
    """
    store = open_store(run)
    for identity in plan.values():
        teacher = run_of_teacher(run, identity.teacher).teacher
        asks = identity.stage in {"extract", "estimate"} and isinstance(
            teacher, SglangServerTeacher
        )
        if not asks or store.find(identity.kind, identity.digest) is not None:
            continue
        assert isinstance(teacher, SglangServerTeacher)
        try:
            httpx.get(teacher.url, timeout=ANSWER_S)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"teacher.url={teacher.url} does not answer ({type(error).__name__}: {error}); "
                "start an SGLang server there, or set teacher.type to sglang"
            ) from error


def _sglang_field(run: RunConfig, stage: str) -> str | None:
    """The field that has a stage run in SGLang."""
    if stage == "generate" and run.data.answers and run.data.answers.engine.type == "sglang":
        return "data.answers.engine.type"
    if stage == "train" and run.on_policy and run.on_policy.rollout.type == "sglang":
        return "on_policy.rollout.type"
    teaches = stage in {"extract", "estimate"} or (stage == "train" and run.teacher_in_training)
    return "teacher.type" if teaches and run.teacher.type == "sglang" else None
