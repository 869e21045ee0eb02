"""The whole chain of stages with its store, and its data, behind an S3 endpoint."""

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from transformers import AutoModelForCausalLM

from configs.load import load_run
from kdflow_core.errors import WorkerError
from storage.artifact import ArtifactRef
from storage.maintenance import damages, find_entry, remove_artifact
from storage.store import ArtifactStore
from tasks.execution.launch import launch_stage
from tasks.presentation.results import evaluation_rows, report_path, student_path
from tasks.presentation.tracking import METRICS_FILE, read_metrics
from tasks.stages.explanation import stage_status
from tasks.stages.identity import StageSpec, open_store, stage_spec
from tasks.stages.planning import plan_stages
from tests.conftest import run_inline
from tests.processes import kill_a_rank_when
from tests.stored import Stored

pytestmark = pytest.mark.ranks


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on loopback, credentials and endpoint by the usual variables."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-of-nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec keeps file systems by their arguments, and the endpoint is none of them.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"kdflow-{uuid.uuid4().hex}"  # what servers hold is of the process, not of one of them
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    server.stop()


def test_another_machine_goes_on_from_checkpoints_in_the_bucket(
    bucket: str, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    files = fsspec.filesystem("s3")
    recipe = str(make_recipe(max_steps=30, num_ranks=2, checkpoint_every=3))
    overrides = {"storage.root": f"{bucket}/store", "storage.checkpoints": "store"}
    run = load_run(recipe, overrides)
    spec = stage_spec(plan_stages(run)["train"], run, run_inline(run, until="extract"))
    kept = f"{bucket}/store/checkpoints/student/{spec.identity.digest}"

    def a_checkpoint_is_kept() -> bool:
        files.invalidate_cache()
        return bool(files.glob(f"{kept}/*/complete"))

    killer = threading.Thread(target=kill_a_rank_when, args=(a_checkpoint_is_kept,))
    killer.start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        launch_stage(spec, logging.getLogger("test"))
    killer.join()
    other = load_run(recipe, overrides | {"storage.scratch": str(tmp_path / "other")})
    spec = spec.model_copy(update={"run": other})
    student = open_store(other).local_copy(launch_stage(spec, logging.getLogger("test")))
    steps = [record["step"] for record in read_metrics(student / METRICS_FILE)]
    assert steps == list(range(1, 31)), "those before the kill come from the store"
    files.invalidate_cache()
    assert not files.find(kept)


def test_machines_that_share_a_bucket_compute_a_stage_once(
    bucket: str, make_recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the same time, each with a scratch folder of its own; both read the one artifact."""
    recipe, specs = str(make_recipe()), []
    for name in ("one", "other"):
        places = {"storage.root": f"{bucket}/store", "storage.scratch": str(tmp_path / name)}
        run = load_run(recipe, places)
        specs.append(StageSpec(identity=plan_stages(run)["tokenize"], run=run, inputs={}))
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO):
        refs = list(pool.map(launch_stage, specs, [logging.getLogger("test")] * 2))
    assert refs[0] == refs[1]
    assert caplog.text.count("training and") == 1  # the stage's own message
    tables = [
        (open_store(spec.run).local_copy(ref) / "train.arrow").read_bytes()
        for spec, ref in zip(specs, refs, strict=True)
    ]
    assert tables[0] == tables[1]


def test_shards_of_another_artifact_are_copied_by_the_bucket(bucket: str, tmp_path: Path) -> None:
    """They do not go through this machine; the artifact is whole without the other."""
    store = ArtifactStore(root=f"{bucket}/store", scratch=str(tmp_path / "scratch"))
    first = Stored(store, [16, 7, 9, 12, 4, 16], codec="int8")
    expected = [
        first.write_all().rows(key, targets)
        for key, targets in zip(first.keys, first.targets, strict=True)
    ]
    night = Stored(store, [5, 8], seed=1, codec="int8").with_rows_of(first)
    writer = night.borrowing_writer(first)
    assert writer.borrow() > 2
    assert writer.borrow() == 0
    night.write(writer, writer.missing_shards())
    night.commit(writer)
    remove_artifact(store, find_entry(store, f"states/{first.digest}"))
    taken = {night.keys[number] for shard in range(3) for number in writer.sequences_of(shard)}
    reader = night.reader()
    for key, targets, rows in zip(first.keys, first.targets, expected, strict=True):
        if key in taken:
            np.testing.assert_array_equal(reader.rows(key, targets), rows)
    assert not list(damages(store, find_entry(store, f"states/{night.digest}")))


def run_all(recipe: str, overrides: dict[str, object]) -> dict[str, ArtifactRef]:
    run = load_run(recipe, overrides)
    done: dict[str, ArtifactRef] = {}
    for identity in plan_stages(run).values():
        spec = StageSpec(identity=identity, run=run, inputs=done)
        done = done | {identity.output: launch_stage(spec, logging.getLogger("test"))}
    return done


def test_store_and_data_on_s3(
    bucket: str, make_recipe: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    files = fsspec.filesystem("s3")
    files.put_file(str(data_file), f"{bucket}/data/sums.jsonl")
    recipe = str(make_recipe(max_steps=3))
    overrides = {
        "storage.root": f"{bucket}/store",
        "data.sources.0.path": f"{bucket}/data/sums.jsonl",
        "eval.max_generations": 1,
    }
    refs = run_all(recipe, overrides)
    run = load_run(recipe, overrides)
    assert all(status.cached for status in stage_status(run, plan_stages(run)))
    assert refs["states"].uri.startswith(f"{bucket}/store/artifacts/states/")
    assert evaluation_rows(open_store(run), refs["evaluation"])[0]["source"] == "all"
    assert "Held-out evaluation" in report_path(open_store(run), refs["report"]).read_text()
    AutoModelForCausalLM.from_pretrained(student_path(open_store(run), refs["student"]))

    # The same run on the local disk has the same weights: the store's place does not matter.
    local = run_all(recipe, {"eval.max_generations": 1})
    content = (Path(local["student"].uri) / "model/model.safetensors").read_bytes()
    assert (
        student_path(open_store(run), refs["student"]) / "model.safetensors"
    ).read_bytes() == content

    # Credentials are in no manifest and no log of the store.
    for path in files.find(f"{bucket}/store"):
        if path.endswith((".json", ".jsonl", ".html", ".md")):
            assert b"test-secret-of-nobody" not in files.cat_file(path)
    assert "test-secret-of-nobody" not in json.dumps(run.model_dump(mode="json"))
