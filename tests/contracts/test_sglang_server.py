"""`teacher.type: sglang_server` against a real server, on the CPU. The last test ends it."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from configs.load import ConfigError, load_run
from configs.schema.teacher import SglangServerTeacher
from kdflow_core.contracts import OutputHead, TeacherEngine, TokenSequence
from kdflow_core.errors import ModelError
from kdflow_core.models.heads import load_head
from kdflow_core.models.loading import load_config
from kdflow_core.teacher.server import FLAGS, SglangServerEngine, check_flags
from kdflow_core.teacher.streaming import stream_states
from kdflow_core.workers.ports import free_port
from tasks.execution.launch import launch_stage
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.conftest import VOCABULARY, run_inline
from tests.contracts.test_teacher import (
    CPU,
    exact_and_bfloat16,
    relative_error,
    sequences,
    states_of,
)
from tests.processes import PATIENCE_S

# SGLang's own defaults need kernels that a plain CPU does not have.
ON_A_CPU = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch "
    "--grammar-backend none --disable-cuda-graph --mem-fraction-static 0.1 "
    "--max-total-tokens 8192 --skip-server-warmup"
)


@pytest.fixture(scope="module")
def server(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the tiny Llama in bfloat16."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(teacher_folder)]
    options = ["--dtype", "bfloat16", "--port", str(port), *FLAGS.split(), *ON_A_CPU.split()]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
    deadline = time.monotonic() + PATIENCE_S
    while not _answers(url):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    yield url
    end(process.pid)
    process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health_generate", timeout=60).is_success
    except httpx.TransportError:
        return False


def end(pid: int) -> None:
    """A process and its children."""
    if psutil.pid_exists(pid):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            one.kill()


def head_of(folder: Path) -> OutputHead:
    return load_head(folder, load_config(folder), VOCABULARY)


def make_engine(url: str, folder: Path, **options: object) -> SglangServerEngine:
    head = options.pop("head", None) or head_of(folder)
    config = {"model": {"type": "pretrained", "path": str(folder)}, "url": url}
    return SglangServerEngine(
        SglangServerTeacher.model_validate(config | {"tokens_per_batch": 64} | options),
        folder=folder,
        head=head,
        longest=64,
        device=CPU,
    )


def test_states_are_as_exact_as_those_of_transformers(server: str, teacher_folder: Path) -> None:
    engine: TeacherEngine = make_engine(server, teacher_folder)
    expected, theirs = exact_and_bfloat16(teacher_folder)
    given = states_of(engine)
    assert relative_error(given, expected) <= 1.25 * relative_error(theirs, expected)
    engine.close()
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        engine.forward(sequences()[:1])


def test_a_sequence_over_the_servers_limit(server: str, teacher_folder: Path) -> None:
    with closing(make_engine(server, teacher_folder)) as engine:
        length = engine.max_length + 1
        assert 200 < length <= 257  # the model has 256 positions; the server keeps some
        supervised_T = np.arange(length) == length - 1
        long = TokenSequence(ids_T=np.ones(length, dtype=np.int32), supervised_T=supervised_T)
        with pytest.raises(ModelError, match=f"a sequence has {length} tokens"):
            list(stream_states(engine, [long], window_tokens=64))


def test_another_model_than_the_served_one(
    server: str, teacher_folder: Path, student_folder: Path
) -> None:
    head = head_of(teacher_folder)
    rolled = OutputHead(weight_VH=head.weight_VH.roll(1, 0))
    with pytest.raises(ModelError, match="serves another model than"):
        make_engine(server, teacher_folder, head=rolled)
    with pytest.raises(ModelError, match="is it another model than"):
        make_engine(server, teacher_folder, head=head_of(student_folder))


def test_another_dtype_than_the_servers(server: str, teacher_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"computes in bfloat16 .*teacher\.dtype=float32"):
        make_engine(server, teacher_folder, dtype="float32")


@pytest.mark.parametrize("missing", ["enable_return_hidden_states", "disable_radix_cache"])
def test_a_server_without_the_flags(server: str, teacher_folder: Path, missing: str) -> None:
    """Its answer is that of the real server, but for the flag."""
    info = httpx.get(f"{server}/server_info").json()
    config = SglangServerTeacher.model_validate(
        {"model": {"type": "pretrained", "path": str(teacher_folder)}, "url": server}
    )
    check_flags(info, config, teacher_folder)
    with pytest.raises(ModelError, match="start it with `--enable-return-hidden-states"):
        check_flags(info | {missing: False}, config, teacher_folder)


def test_live_is_refused(make_recipe: Callable[..., Path]) -> None:
    server = {"teacher.type": "sglang_server", "teacher.url": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"sglang_server runs elsewhere; set delivery=replay"):
        load_run(str(make_recipe()), server | {"delivery": "live"})


@pytest.mark.ranks
def test_extraction_then_the_server_dies(
    server: str,
    teacher_folder: Path,
    make_recipe: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = {"teacher.type": "sglang_server", "teacher.url": server}
    run = load_run(str(make_recipe()), teacher | {"teacher.dtype": "bfloat16"})
    refs = run_inline(run, until="tokenize")
    spec = StageSpec(identity=plan_stages(run)["extract"], run=run, inputs=refs)
    with caplog.at_level(logging.INFO):
        artifact = launch_stage(spec, logging.getLogger("test"))
    assert artifact.kind == "states"
    assert caplog.text.count("come over HTTP as text, at about") == 1

    with closing(make_engine(server, teacher_folder)) as engine:
        engine.forward(sequences()[:1])
        (listening,) = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == "LISTEN" and c.laddr.port == httpx.URL(server).port
        }
        end(listening)
        with pytest.raises(ModelError, match="no answer from the SGLang server at teacher"):
            engine.forward(sequences()[:1])
    with pytest.raises(ModelError, match="Start one with"):
        make_engine(server, teacher_folder)
