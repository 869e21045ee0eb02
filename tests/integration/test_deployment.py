"""A real server and a real worker run the deployment, as the README says."""

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import psutil
import pytest
import yaml
from docker.types import HostConfig
from prefect import flow
from prefect.concurrency.sync import concurrency
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.base import BaseJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from configs.schema.run import StorageConfig
from kdflow_core.student.checkpoint import completed_steps
from tasks.execution.progress_artifact import LONG_S, ProgressArtifact
from tasks.execution.termination import SAVE_S
from tests.command import kdflow
from tests.prefect_server import Server, start_server
from tests.processes import PATIENCE_S, stage_ranks
from tests.readme import ROOT, commands

pytestmark = [pytest.mark.prefect, pytest.mark.ranks]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("checkout"), migrated)
    yield running
    running.stop()


def prefect_commands() -> list[list[str]]:
    """Those of the README: a server, a pool, the deployments, a worker, and runs."""
    return [words for words in commands("As a service") if words[0] == "prefect"]


@pytest.fixture(scope="module")
def deployed(server: Server) -> str:
    """What is said of the deployments, by the README's commands."""
    pool, deploy = (w[1:] for w in prefect_commands()[1:3])
    server.command(*pool)
    return server.command(*deploy)


def ranks_of_training(worker: int, count: int = 1) -> list[psutil.Process]:
    """Those below a worker, once they are there."""
    deadline = time.monotonic() + PATIENCE_S
    while len(ranks := stage_ranks(psutil.Process(worker))) < count:
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.5)
    return ranks


def test_a_run_that_is_moved_to_another_machine_goes_on_there(
    server: Server, deployed: str, make_recipe: Callable[..., Path]
) -> None:
    """As in containers: `prefect flow-run execute` gets a SIGTERM, has training save, and gives the
    run back to the server. Before there is a worker, which would take it.
    """
    assert "kd/offpolicy" in deployed
    recipe = make_recipe(num_ranks=2, max_steps=300, checkpoint_every=10**6)
    parameters = (f"recipe={recipe}", 'overrides={"name": "moved"}')
    given = [word for parameter in parameters for word in ("--param", parameter)]
    said = server.command("deployment", "run", "kd/offpolicy", *given)
    (run,) = (own for own in server.runs() if str(own["id"]) in said)
    run_id = str(run["id"])
    server.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] = "reschedule"
    execute = server.start("flow-run", "execute", run_id)
    container = psutil.Process(execute.pid)
    deadline = time.monotonic() + PATIENCE_S
    checkpoints = recipe.parent / "scratch/student"
    while not re.search("[1-9][0-9]* of 300 steps", (server.folder / "flow-run.log").read_text()):
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.5)
    ranks = stage_ranks(container)
    container.terminate()
    assert execute.wait(PATIENCE_S) == 0
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    (now,) = server.runs(flow_runs={"id": {"any_": [run_id]}})
    assert now["state_name"] == "AwaitingRetry"
    (steps,) = (completed_steps(own / "checkpoints") for own in checkpoints.iterdir())
    assert steps[-1] > 0
    server.command("flow-run", "execute", run_id)
    (now,) = server.runs(flow_runs={"id": {"any_": [run_id]}})
    assert now["state_name"] == "Completed"
    log = httpx.post(
        f"{server.api}/logs/filter", json={"logs": {"flow_run_id": {"any_": [run_id]}}}
    ).json()
    resumed = f"training from step {steps[-1]} of 300 (resumed from a checkpoint)"
    assert any(resumed in line["message"] for line in log)
    assert httpx.delete(f"{server.api}/flow_runs/{run_id}").is_success  # others count runs


def test_a_deployment_fails_is_retried_and_runs_to_completion(
    server: Server, deployed: str, make_recipe: Callable[..., Path]
) -> None:
    """What the failed run had finished comes from cache, in its retry and in the next run, and the
    UI says so. The README's commands, but for the port and the recipe.
    """
    start_worker, run_it = (w[1:] for w in prefect_commands()[3:5])
    assert "kd/offpolicy" in deployed
    assert "kd/nightly" in deployed
    assert "kd/onpolicy" in deployed
    server.processes.append(server.start(*start_worker))

    # The cron schedule really creates runs.
    deadline = time.monotonic() + PATIENCE_S
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    while not any("nightly" in str(run["tags"]) for run in server.runs(**scheduled)):
        assert time.monotonic() < deadline, "the nightly schedule created no run"
        time.sleep(1)

    bad_recipe = ("--param", f"recipe={make_recipe(lr=1e30)}")
    server.command("deployment", "run", "kd/offpolicy", *bad_recipe, "--watch", code=1)
    (failed,) = server.runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert "not both finite" in str(failed["state"])
    server.command("flow-run", "retry", str(failed["name"]))
    deadline = time.monotonic() + PATIENCE_S
    while True:
        (now,) = server.runs(flow_runs={"id": {"any_": [failed["id"]]}})
        if now["run_count"] == 2 and now["state_type"] == "FAILED":
            break
        assert time.monotonic() < deadline, now["state"]
        time.sleep(0.5)
    states = server.all_task_states(failed["id"])
    for stage in ("tokenize", "extract"):
        # Computed once, by the first attempt.
        assert states.count((stage, "Completed")) == 1, states
        assert {state for name, state in states if name == stage} <= {"Completed", "Cached"}
    assert ("train", "Failed") in states

    run_it = [w.replace("recipe=quickstart", f"recipe={make_recipe()}") for w in run_it]
    server.command(*run_it)
    (completed,) = server.runs(flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}})
    done = dict.fromkeys(("tokenize", "extract"), "Cached")
    done |= dict.fromkeys(("train", "evaluate", "report"), "Completed")
    assert server.task_states(completed["id"]) == done
    artifacts = httpx.post(f"{server.api}/artifacts/filter", json={}).json()
    tables = [a for a in artifacts if a["type"] == "table" and a["key"] != "moved-evaluation"]
    assert [a["key"] for a in tables] == ["tiny-evaluation"]
    assert "student after" in str(tables[0]["data"])


@pytest.mark.slow  # what is said of wrong parameters: test_bad_inputs
def test_a_wrong_parameter_fails_with_its_path_and_remedy(server: Server) -> None:
    """With the worker from above."""
    bad = server.command(
        "deployment", "run", "kd/offpolicy", "--param", "recipe=quickstrat", "--watch", code=1
    )
    assert "Failed" in bad
    failed = server.runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert re.search("did you mean 'quickstart'", str(failed[0]["state"]))


def events_of(server: Server, prefix: str, run: str, count: int) -> list[dict[str, Any]]:
    """A run's events whose names begin so, the oldest first, once there are so many: the server
    keeps them a little after it has acted on them.
    """
    where = {"filter": {"event": {"prefix": [prefix]}, "order": "DESC"}, "limit": 50}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = httpx.post(f"{server.api}/events/filter", json=where).json()["events"]
        own = [event for event in reversed(found) if event["resource"]["kdflow.run"] == run]
        if len(own) >= count:
            return own
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


@pytest.mark.parametrize(
    "start",
    [
        "kdflow run",
        pytest.param("prefect deployment run", marks=pytest.mark.slow),  # the same flow
    ],
)
def test_on_policy_rounds_are_subflows(
    server: Server, make_recipe: Callable[..., Path], start: str
) -> None:
    """Each with its three tasks, and its figures and some answers as an artifact. With the server
    and the worker from above; rounds that are done stay done: `test_on_policy`.
    """
    name = start.replace(" ", "-")
    recipe = make_recipe(max_steps=None)
    on_policy = {
        "rounds": 2,
        "prompts_per_round": 8,
        "max_new_tokens": 8,
        "rollout": {"type": "transformers", "dtype": "float32"},
    }
    overrides = {"name": name, "mode": "onpolicy", "on_policy": on_policy}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | overrides))
    earlier = server.runs()
    if start == "kdflow run":
        with temporary_settings({PREFECT_API_URL: server.api}):
            kdflow("run", str(recipe))
    else:
        (run_it,) = (w[1:] for w in commands("As a service") if "kd/onpolicy" in w)
        run_it = [w.replace("recipe=quickstart-onpolicy", f"recipe={recipe}") for w in run_it]
        server.command(*run_it)
    new = [run for run in server.runs() if run["id"] not in {run["id"] for run in earlier}]
    rounds = [run for run in new if str(run["name"]).startswith("round-")]
    assert sorted(str(run["name"]) for run in rounds) == ["round-1-of-2", "round-2-of-2"]
    for run in rounds:
        assert server.task_states(run["id"]) == dict.fromkeys(
            ("rollout", "score", "train"), "Completed"
        )
    told = events_of(server, "kdflow.round.", name, 2)
    assert [event["resource"]["kdflow.round"] for event in told] == ["1", "2"]
    assert all(event["payload"]["heldout"]["reverse_kl"] > 0 for event in told)
    artifacts = httpx.post(f"{server.api}/artifacts/filter", json={}).json()
    shown = [a["data"] for a in artifacts if a["key"] == f"{name}-round"]
    assert len(shown) == 2
    assert all("held-out reverse kl" in text and "plus" in text for text in shown)


@pytest.mark.slow  # that nothing of a run is left when it is ended: test_interrupt
def test_a_cancelled_run_leaves_no_process(
    server: Server, make_recipe: Callable[..., Path]
) -> None:
    """Runs after the test above, with its worker."""
    recipe = ("--param", f"recipe={make_recipe(num_ranks=2, max_steps=1_000_000)}")
    server.command("deployment", "run", "kd/offpolicy", *recipe)
    ranks = ranks_of_training(server.processes[-1].pid, count=2)
    (running,) = server.runs(flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})
    server.command("--no-prompt", "flow-run", "cancel", str(running["id"]))
    _, alive = psutil.wait_procs(ranks, timeout=90)
    assert not alive
    deadline = time.monotonic() + PATIENCE_S
    while server.runs(flow_runs={"id": {"any_": [running["id"]]}})[0]["state_type"] != "CANCELLED":
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_secret_comes_from_a_block_of_prefect(
    server: Server, deployed: str, make_recipe: Callable[..., Path]
) -> None:
    """By the guide's commands: a run's process has it, and the deployment says where it is."""
    assert "kd/offpolicy" in deployed
    save, template, edit, update = commands("Secrets", "docs/server.md")
    server.command(*template[1:])
    for words in ([sys.executable, *save[1:]], edit):
        subprocess.run(
            words, env=server.env, cwd=server.folder, input="a very secret word\n", text=True,
            check=True, capture_output=True,
        )  # fmt: skip
    before = httpx.get(f"{server.api}/work_pools/local").json()["base_job_template"]
    server.command(*update[1:])
    known = httpx.get(f"{server.api}/work_pools/local").text
    assert "prefect.blocks.secret.hf-token" in known
    assert "a very secret word" not in known
    recipe = make_recipe(max_steps=1_000_000)
    given = ("--param", f"recipe={recipe}", "--param", 'overrides={"name": "secret"}')
    with server.worker(*prefect_commands()[3][1:]) as worker:
        said = server.command("deployment", "run", "kd/offpolicy", *given)
        ranks = ranks_of_training(worker.pid)
        assert {rank.environ()["HF_TOKEN"] for rank in ranks} == {"a very secret word"}
        (run,) = (own for own in server.runs() if str(own["id"]) in said)
        assert "a very secret word" not in httpx.get(f"{server.api}/flow_runs/{run['id']}").text
        server.command("--no-prompt", "flow-run", "cancel", str(run["id"]))
        psutil.wait_procs(ranks, timeout=90)
    assert httpx.delete(f"{server.api}/flow_runs/{run['id']}").is_success  # others count runs
    changed = httpx.patch(f"{server.api}/work_pools/local", json={"base_job_template": before})
    assert changed.is_success


@pytest.mark.slow  # a minute, mostly of waiting
def test_a_server_that_restarts_in_the_middle_of_a_run(
    server: Server, deployed: str, make_recipe: Callable[..., Path]
) -> None:
    """The run goes on without it, and ends as if it had been there."""
    assert "kd/offpolicy" in deployed
    recipe = make_recipe(max_steps=200, checkpoint_every=10**6)
    given = ("--param", f"recipe={recipe}", "--param", 'overrides={"name": "restarted"}')
    with server.worker(*prefect_commands()[3][1:]) as worker:
        said = server.command("deployment", "run", "kd/offpolicy", *given)
        (run,) = (own for own in server.runs() if str(own["id"]) in said)
        ranks_of_training(worker.pid)
        server.restart(away_s=20)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            (now,) = server.runs(flow_runs={"id": {"any_": [run["id"]]}})
            if now["state_type"] in ("COMPLETED", "FAILED", "CRASHED"):
                break
            assert time.monotonic() < deadline, now["state"]
            time.sleep(0.5)
    assert now["state_name"] == "Completed", (server.folder / "worker.log").read_text()[-6000:]
    assert now["run_count"] == 1


@pytest.mark.slow  # two minutes, mostly of waiting for heartbeats that do not come
def test_a_run_that_was_killed_is_shown_as_crashed(
    server: Server,
    deployed: str,
    make_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the automation of `kdflow service init`, with nobody left on the machine to tell; the same
    run again then comes from the store, as far as it came.
    """
    assert "kd/offpolicy" in deployed
    monkeypatch.setattr("flows.service_commands.SILENT_S", 45)
    monkeypatch.setitem(server.env, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    recipe = make_recipe(max_steps=1_000_000)
    given = ("--param", f"recipe={recipe}", "--param", 'overrides={"name": "killed"}')
    with temporary_settings({PREFECT_API_URL: server.api}):
        kdflow("service", "init", "--pool", "killed")
        with server.worker(*prefect_commands()[3][1:]) as worker:
            said = server.command("deployment", "run", "kd/offpolicy", *given)
            (run,) = (own for own in server.runs() if str(own["id"]) in said)
            ranks_of_training(worker.pid)
            time.sleep(35)  # for a heartbeat
            here = psutil.Process(worker.pid)
            for process in (*here.children(recursive=True), here):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            (now,) = server.runs(flow_runs={"id": {"any_": [run["id"]]}})
            if now["state_type"] != "RUNNING":
                break
            assert time.monotonic() < deadline, "it is shown as running for ever"
            time.sleep(1)
        kdflow("service", "remove", "--pool", "killed")
        again = kdflow("run", str(make_recipe()), "name=killed")
    assert now["state_type"] == "CRASHED"
    assert "no heartbeat within 45 s" in str(now["state"])
    cached = re.findall(r"Task run '(\w+)-\w+' - Finished in state Cached", again)
    assert set(cached) == {"tokenize", "extract"}


def test_runs_of_a_pool_of_devices_take_turns(
    server: Server, make_recipe: Callable[..., Path]
) -> None:
    """By the limit that `kdflow service init` creates, and `remove` takes away."""

    def limits() -> dict[str, int]:
        found = httpx.post(f"{server.api}/v2/concurrency_limits/filter", json={}).json()
        return {limit["name"]: limit["active_slots"] for limit in found}

    def automations() -> list[str]:
        found = httpx.post(f"{server.api}/automations/filter", json={}).json()
        return [own["name"] for own in found if "kdflow" in own["name"]]

    with temporary_settings({PREFECT_API_URL: server.api}):
        assert "created the limit kdflow-one" in kdflow("service", "init", "--pool", "one")
        assert "the limit kdflow-one is there" in kdflow("service", "init", "--pool", "one")
        assert limits()["kdflow-one"] == 0
        assert len(automations()) == 1

        seen: list[object] = []

        def hold() -> None:
            """The devices, until a run has waited for them for a while."""
            running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
            with concurrency("kdflow-one", occupy=1):
                held.set()
                deadline = time.monotonic() + 60
                while not server.runs(**running) and time.monotonic() < deadline:
                    time.sleep(0.2)
                time.sleep(3)
                seen.extend(server.all_task_states(run["id"]) for run in server.runs(**running))

        held = threading.Event()
        holder = threading.Thread(target=copy_context().run, args=(hold,))
        holder.start()
        assert held.wait(60)
        said = kdflow("run", str(make_recipe()), "device_pool=one")
        holder.join()
        assert seen == [[]], "a run was there, and none of its stages"
        assert "promoted" in said
        kdflow("service", "remove", "--pool", "one")
        assert "kdflow-one" not in limits()
        assert automations() == []


def test_an_automation_holds_the_nights_after_a_student_that_got_worse(
    server: Server, deployed: str, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """By the file that the guide names, and by what a run tells the server at its end."""
    assert "kd/nightly" in deployed
    nightly = httpx.get(f"{server.api}/deployments/name/kd/nightly").json()["id"]
    (command,) = (w[1:] for w in commands("Having Prefect act on it", "docs/nightly.md"))
    text = (ROOT / command[-1]).read_text().replace("NAME", "held").replace('"ID"', f'"{nightly}"')
    automation = tmp_path / "hold-nights.json"
    automation.write_text(text)
    server.command(*command[:-1], str(automation))

    recipe, judged = str(make_recipe()), "kdflow.student."
    with temporary_settings({PREFECT_API_URL: server.api}):
        kdflow("run", recipe, "name=held", "promotion.metric=forward_kl")
        kdflow("run", recipe, "name=held", "promotion.metric=forward_kl", "student.lr=10")
    deadline = time.monotonic() + PATIENCE_S
    while not httpx.get(f"{server.api}/deployments/{nightly}").json()["paused"]:
        assert time.monotonic() < deadline, "the automation did not act"
        time.sleep(0.5)
    own = events_of(server, judged, "held", 2)
    assert [event["event"] for event in own] == [f"{judged}promoted", f"{judged}kept-back"]
    before, after = (event["payload"]["scores"]["forward_kl"] for event in own)
    assert after > before
    stages = events_of(server, "kdflow.stage.", "held", 10)
    assert [event["resource"]["kdflow.stage"] for event in stages] == 2 * [
        "tokenize", "extract", "train", "evaluate", "report"
    ]  # fmt: skip


def test_a_bar_appears_when_a_stage_takes_long(server: Server) -> None:
    def bars() -> list[float]:
        found = httpx.post(f"{server.api}/artifacts/filter", json={}).json()
        return [own["data"] for own in found if own["key"] == "own-train"]

    @flow
    def stage() -> None:
        bar = ProgressArtifact("own-train", "Stage train")
        bar.show(1, 8, LONG_S / 2)
        bar.show(1, 0, 2 * LONG_S)  # nobody knows how much there is
        assert bars() == []
        bar.show(2, 8, LONG_S)
        assert bars() == [25.0]
        bar.show(9, 8, 3 * LONG_S)
        assert bars() == [100.0]

    with temporary_settings({PREFECT_API_URL: server.api}):
        stage()


def made_job(
    server: Server, configuration: type[BaseJobConfiguration], pool: str, **values: object
) -> Any:
    """What a worker of a pool starts for a run that has these values, by Prefect's own classes."""
    template = httpx.get(f"{server.api}/work_pools/{pool}").json()["base_job_template"]
    given = {"name": "night", "command": "prefect flow-run execute", "labels": {"a": "b"}}
    with temporary_settings({PREFECT_API_URL: server.api}):
        return asyncio.run(
            configuration.from_template_and_values(
                base_job_template=template, values=given | values
            )
        )


def test_runs_in_containers_of_their_own(server: Server) -> None:
    """Pools and deployments as the guide makes them; that what a worker would start has GPUs, and
    keeps store and scratch folder. No container is started: here is no Docker.
    """
    for words in commands("Containers", "docs/server.md"):
        if words[:2] in (["prefect", "work-pool"], ["prefect", "--no-prompt"]):
            server.command(*words[1:])
    found = httpx.post(f"{server.api}/deployments/filter", json={}).json()
    for deployment in (own for own in found if own["name"].endswith("-container")):
        assert deployment["work_pool_name"] == "containers"
        step = "prefect.deployments.steps.set_working_directory"
        assert deployment["pull_steps"] == [{step: {"directory": "/opt/kdflow"}}]

    job = made_job(server, KubernetesWorkerJobConfiguration, "containers", gpus=8)
    pod = job.job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert pod["terminationGracePeriodSeconds"] > SAVE_S
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    kept = PurePosixPath(mounts["kdflow"])
    assert job.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"

    docker = made_job(server, DockerWorkerJobConfiguration, "docker-containers", image="own:1")
    assert docker.env == job.env
    assert docker.image == "own:1"
    assert docker.volumes == [f"kdflow:{kept}"]
    created = HostConfig(version="1.41", **docker.container_create_kwargs)
    assert created["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    storage = StorageConfig()
    for place in (storage.root, storage.scratch):
        assert (PurePosixPath("/opt/kdflow") / place).is_relative_to(kept)


def test_without_a_server_that_lasts_there_is_nothing_to_set_up() -> None:
    assert "PREFECT_API_URL is not set" in kdflow("service", "init", code=1)
