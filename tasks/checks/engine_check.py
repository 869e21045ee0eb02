"""Whether the engines that a run needs are there, before any of it runs."""

from collections.abc import Mapping

from configs.errors import ConfigError
from configs.schema.engines import Engine, SglangEngine
from configs.schema.rollout import Rollout
from configs.schema.run import RunConfig
from configs.schema.teacher import SglangServerTeacher, SglangTeacher, Teacher
from kdflow_core.errors import ModelError
from kdflow_core.sglang_runtime.versions import check_names, check_sglang
from tasks.stages.catalogue import engines_of
from tasks.stages.identity import StageIdentity, find, run_of_teacher

ANSWER_S = 10.0


def check_engines(
    run: RunConfig, plan: Mapping[str, StageIdentity], *, ask_servers: bool = False
) -> None:
    """Refuse a run with a stage still to run whose engine is not there: SGLang where no tested
    version is installed, and with `ask_servers` a server that does not answer.

    Raises ConfigError, which names the field.
    """
    for identity in plan.values():
        own = run_of_teacher(run, identity.teacher)
        engines = engines_of(own, identity.stage)
        wanted = {f: e for f, e in engines.items() if e.type in ("sglang", "sglang_server")}
        if not wanted or find(run, identity) is not None:
            continue
        for field, engine in wanted.items():
            if isinstance(engine, SglangServerTeacher):
                if ask_servers:
                    _check_server(engine, field)
            else:
                _check_sglang(engine, field)


def _check_sglang(engine: Teacher | Engine | Rollout, field: str) -> None:
    try:
        check_sglang()
        if isinstance(engine, SglangTeacher):
            check_names(
                attention_backend=engine.attention_backend, quantization=engine.quantization
            )
        elif isinstance(engine, SglangEngine):
            check_names(attention_backend=engine.attention_backend, quantization=None)
    except ModelError as error:
        raise ConfigError(f"{field}.type=sglang: {error}") from error


def _check_server(teacher: SglangServerTeacher, field: str) -> None:
    import httpx  # noqa: PLC0415 - not for `--help`

    try:
        httpx.get(teacher.url, timeout=ANSWER_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"{field}.url={teacher.url} does not answer ({type(error).__name__}: {error}); "
            f"start an SGLang server there, or set {field}.type to sglang"
        ) from error
