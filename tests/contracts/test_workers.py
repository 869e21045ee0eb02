"""The worker contract, for every launcher: calls and replies, events, who ends when somebody dies,
stops or stands still.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.schema.workers import RayWorkers
from kdflow_core.errors import WorkerError
from kdflow_core.workers.base import Launcher, Placement, WorkerGroup
from kdflow_core.workers.group import save_ranks
from kdflow_core.workers.local import LocalLauncher
from kdflow_core.workers.ray_launcher import RayLauncher
from tests.processes import FORK_SERVER, PATIENCE_S, wait_until_gone
from tests.ray_cluster import RayCluster, running_cluster
from tests.readme import ROOT

pytestmark = pytest.mark.ranks

# What the forked ones have loaded has threads of its own by then.
LAUNCHERS: dict[str, Callable[[], Launcher]] = {
    "local": LocalLauncher,
    "local, forked": lambda: LocalLauncher(["numpy"]),
    "ray": lambda: RayLauncher(
        RayWorkers(type="ray", address=os.environ[CLUSTER], strategy="spread")
    ),
}
CLUSTER = "CLUSTER_UNDER_TEST"
CHOSEN = "LAUNCHER_UNDER_TEST"  # a variable, as some tests have a launcher in another process
RANK = """
import os, sys, time
from pathlib import Path
from kdflow_core.workers.base import offered
from kdflow_core.workers.rank_side import emit

class Host:
    def __init__(self, context, spec):
        self.folder, self.rank, self.address = Path(spec), context.rank, context.address

    @offered
    def work(self):
        folder, rank = self.folder, self.rank
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
"""
CLOSE = """
    def close(self):
        (self.folder / f"closed-{self.rank}").touch()
"""


# What watches ranks is one thing for both, and such tests wait.
WATCHED = pytest.mark.parametrize(
    "_launcher",
    [pytest.param("local", marks=pytest.mark.slow), "local, forked"],
    indirect=True,
)


# What is forked, or takes its place; and what is one thing for all launchers.
ON_THIS_MACHINE = pytest.mark.parametrize("_launcher", ["local", "local, forked"], indirect=True)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True, params=sorted(LAUNCHERS))
def _launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, request.param)
    if request.param == "ray":
        cluster = request.getfixturevalue("ray_cluster")
        monkeypatch.setenv(CLUSTER, cluster.address)


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module whose hosts do something, and puts it on the ranks' path."""

    def write(body: str) -> str:
        text = RANK + textwrap.indent(body, " " * 8) + "\n" + CLOSE
        (tmp_path / "rank_under_test.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "rank_under_test"

    return write


class Heard:
    """What a group tells. See `Events`."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.beats = 0

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def line(self, rank: int, text: str) -> None:
        self.lines.append(text)

    def beat(self) -> None:
        self.beats += 1


def run(
    module: str,
    folder: Path,
    num_ranks: int = 2,
    *,
    name: str = "",
    stall_s: float = 1800.0,
) -> Heard:
    heard = Heard()
    with LAUNCHERS[os.environ[CHOSEN]]().start(
        f"{module}:Host",
        str(folder),
        Placement(name=name or module, num_ranks=num_ranks),
        heard,
        stall_s=stall_s,
    ) as group:
        group.call("work").replies()
    return heard


LAUNCH = """
from tests.contracts.test_workers import run
from pathlib import Path
run({module!r}, Path({folder!r}))
"""


def pids_in(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        files = [f for f in folder.glob("pid-*") if f.read_text()]
        if len(files) == count:
            return [int(f.read_text()) for f in files]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_events_and_lines_arrive(rank_module, tmp_path: Path) -> None:
    module = rank_module("emit({'event': 'x', 'rank': rank}); print('plain')")
    heard = run(module, tmp_path)
    assert sorted(e["rank"] for e in heard.events) == [0, 1]
    assert heard.lines == ["plain", "plain"]


@pytest.mark.parametrize("_launcher", ["ray"], indirect=True)
def test_ranks_beside_others_stand_on_their_devices(rank_module, tmp_path: Path) -> None:
    """Of four ranks on two nodes, two that use two devices each, and take no room of their own."""
    body = "emit({'event': self.address, 'devices': os.environ['CUDA_VISIBLE_DEVICES']})"
    job, launcher = f"{rank_module(body)}:Host", LAUNCHERS["ray"]()

    def start(heard: Heard, placement: Placement) -> WorkerGroup:
        return launcher.start(job, str(tmp_path), placement, heard)

    first, second = Heard(), Heard()
    with start(first, Placement(name="first", num_ranks=4)) as group:
        group.call("work").replies()
        beside = Placement(name="second", num_ranks=2, devices=2, beside="first")
        with start(second, beside) as other:
            other.call("work").replies()
        with pytest.raises(WorkerError, match=r"3 ranks of .* have room for 2"):
            start(Heard(), Placement(name="third", num_ranks=3, devices=2, beside="first"))
    seen = dict[str, list[str]]()
    for event in first.events:
        seen.setdefault(event["event"], []).append(event["devices"])
    assert [len(set(devices)) for devices in seen.values()] == [2, 2]
    assert {e["event"]: sorted(e["devices"].split(",")) for e in second.events} == {
        node: sorted(devices) for node, devices in seen.items()
    }


def test_a_rank_that_dies_ends_the_others_and_is_named(rank_module, tmp_path: Path) -> None:
    body = """
print("last words")
while rank == 0 or not (folder / "pid-0").exists():
    time.sleep(0.05)
os.kill(os.getpid(), 9)
"""
    module = rank_module(body)
    with pytest.raises(
        WorkerError, match=r"rank 1 of rank_under_test.* ended by signal SIGKILL \(if nobody sent"
    ) as caught:
        run(module, tmp_path)
    assert "last words" in caught.value.details
    wait_until_gone(pids_in(tmp_path, 2))


def test_a_rank_that_ignores_sigterm_is_killed(
    rank_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdflow_core.workers.group.GRACE_S", 0.5)
    body = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"ready-{rank}").touch()
if rank == 1:
    while not (folder / "ready-0").exists():
        time.sleep(0.05)
    sys.exit(3)
time.sleep(120)
"""
    with pytest.raises(WorkerError, match=r"rank 1 of rank_under_test.* ended by exit code 3"):
        run(rank_module(body), tmp_path)
    wait_until_gone(pids_in(tmp_path, 2))


STOPPABLE = """
from kdflow_core.workers.rank_side import is_asked_to_stop, stoppable
with stoppable():
    (folder / f"ready-{rank}").touch()
    while not is_asked_to_stop():
        if rank == 1 and (folder / "leave").exists() and (folder / "ready-0").exists():
            sys.exit(3)
        time.sleep(0.05)
(folder / f"saved-{rank}").touch()
"""


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "terminated"])
def test_ranks_save_when_they_are_asked_and_when_all_processes_are_terminated(
    rank_module: Callable[[str], str], tmp_path: Path, asked: bool
) -> None:
    """Batch systems send a SIGTERM to each process of a job, not to the launcher alone."""

    def terminate() -> None:
        for rank in (0, 1):
            while not (tmp_path / f"ready-{rank}").exists():
                time.sleep(0.05)
        if asked:
            while not save_ranks(60):  # the launcher may not know yet that they can
                time.sleep(0.05)
            return
        ranks = [psutil.Process(pid) for pid in pids_in(tmp_path, 2)]
        parents = [parent for rank in ranks if (parent := rank.parent()) is not None]
        servers = {parent for parent in parents if FORK_SERVER in parent.cmdline()}
        for process in {*ranks, *servers}:
            process.terminate()

    sender = threading.Thread(target=terminate)
    sender.start()
    run(rank_module(STOPPABLE), tmp_path)
    sender.join()
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_rank_that_could_save_is_ended_at_once_with_the_others(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "leave").touch()
    with pytest.raises(WorkerError, match=r"rank 1 of rank_under_test.* ended by exit code 3"):
        run(rank_module(STOPPABLE), tmp_path)
    wait_until_gone(pids_in(tmp_path, 2))
    assert not (tmp_path / "saved-0").exists()


def test_the_launchers_death_ends_the_ranks_and_their_children(rank_module, tmp_path: Path) -> None:
    body = """
import subprocess
child = subprocess.Popen(["sleep", "120"])
(folder / f"pid-child-{rank}").write_text(str(child.pid))
time.sleep(120)
"""
    module = rank_module(body)
    code = LAUNCH.format(module=module, folder=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pids = pids_in(tmp_path, 4)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_until_gone(pids)


def test_a_question_on_standard_input_finds_its_end(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """A library that asks does not wait for ever, and does not eat the launcher's requests."""
    body = """
import subprocess
try:
    input("Do you trust this code? ")
except EOFError:
    child = subprocess.run(["cat"], capture_output=True, timeout=20)
    (folder / f"asked-{rank}").write_text(child.stdout.decode() or "nothing")
"""
    run(rank_module(body), tmp_path)
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["nothing"] * 2


def test_a_stopped_rank_is_named(
    rank_module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdflow_core.workers.group.SILENT_S", 3.0)
    body = """
import signal
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(120)
"""
    with pytest.raises(WorkerError, match="rank 1 of rank_under_test was stopped"):
        run(rank_module(body), tmp_path)
    wait_until_gone(pids_in(tmp_path, 2))


def test_an_error_of_one_rank_ends_those_that_wait_for_it(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """In the middle of a collective, in which they would wait for days."""
    body = """
import torch
import torch.distributed as dist
from kdflow_core.waiting import PATIENCE
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=PATIENCE
)
dist.barrier()
if rank == 1:
    time.sleep(1)
    raise RuntimeError("the loss has fallen off the table")
dist.all_reduce(torch.ones(3))
"""
    with pytest.raises(WorkerError, match=r"rank 1 of .*the loss has fallen off the table"):
        run(rank_module(body), tmp_path)
    wait_until_gone(pids_in(tmp_path, 2))


@WATCHED
def test_a_stuck_rank_is_named_with_its_place(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """The other one moves on for a while, and then waits for it."""
    body = """
import random, threading
def deep(n): time.sleep(0.1) if n == 0 else deep(n - 1)
until = time.monotonic() + 9
while rank == 0 and time.monotonic() < until:
    deep(random.randrange(50))
threading.Event().wait()
"""
    with pytest.raises(
        WorkerError, match=r"rank 1 of stage train has made no progress .* it stands at .*wait"
    ):
        run(rank_module(body), tmp_path, 2, name="stage train", stall_s=5.0)
    wait_until_gone(pids_in(tmp_path, 2))


@WATCHED
def test_a_rank_may_wait_for_one_that_moves(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """As long as it takes: shares of work are not equal."""
    body = """
import random
def deep(n): time.sleep(0.1) if n == 0 else deep(n - 1)
until = time.monotonic() + 14
while rank == 0 and time.monotonic() < until:
    deep(random.randrange(50))
(folder / f"done-{rank}").touch()
while not (folder / "done-0").exists():
    time.sleep(0.01)
"""
    run(rank_module(body), tmp_path, 2, stall_s=4.0)
    assert (tmp_path / "done-0").exists()


@WATCHED
def test_a_rank_that_tells_of_progress_may_stand(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """The main thread waits at one place while another works."""
    body = """
import threading
from kdflow_core.workers.rank_side import made_progress
def work():
    for _ in range(20):
        time.sleep(0.5)
        made_progress()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    assert run(rank_module(body), tmp_path, 1, stall_s=5.0).beats >= 3


def test_ranks_that_are_still_importing_end_with_their_launcher(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "slow_import.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        f"(Path({str(tmp_path)!r}) / f'pid-{{os.getpid()}}').write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    rank_module("")  # puts the folder on the path
    code = LAUNCH.format(module="slow_import", folder=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pids = pids_in(tmp_path, 2)
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids)


def test_events_stand_on_lines_of_their_own(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """Whatever a library has begun to print."""
    body = """
for number in range(50):
    sys.stdout.write("half a line")
    emit({"event": "x", "number": number})
    os.write(1, b"\\xff\\xfe and bytes that are no text\\n")
"""
    heard = run(rank_module(body), tmp_path, num_ranks=1)
    assert [event["number"] for event in heard.events] == list(range(50))
    assert sum("half a line" in line for line in heard.lines) == 50


SERVING = """
import torch.distributed as dist
from kdflow_core.workers.base import offered
from kdflow_core.workers.devices import join_group

class Server:
    def __init__(self, context, spec):
        self.context, self.total = context, int(spec)

    @offered
    def add(self, number):
        self.total += number
        return self.total

    @offered
    def meet(self):
        join_group(self.context)
        dist.barrier()
        return self.context.model_dump(exclude={"rendezvous", "address"}) | {
            "met": dist.get_world_size()
        }

    @offered
    def fail(self):
        raise ValueError("not today")

    def hidden(self):
        return "a secret"

    def close(self):
        print(f"closed at {self.total}")
"""


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Heard], WorkerGroup]:
    """Starts two ranks that count."""
    (tmp_path / "serving.py").write_text(SERVING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(heard: Heard) -> WorkerGroup:
        placement = Placement(name="counters", num_ranks=2)
        return LAUNCHERS[os.environ[CHOSEN]]().start("serving:Server", "7", placement, heard)

    return start


Serve = Callable[[Heard], WorkerGroup]


def test_calls_are_taken_in_order_and_answered_by_number(serve: Serve) -> None:
    heard = Heard()
    with serve(heard) as group:
        first, second = group.call("add", number=1), group.call("add", number=10)
        assert second.replies() == [18, 18]
        assert first.replies() == [8, 8]
    assert sorted(heard.lines) == ["closed at 18", "closed at 18"]


def test_a_rank_is_told_where_it_stands(serve: Serve) -> None:
    with serve(Heard()) as group:
        met = group.call("meet").replies()
    assert [reply["rank"] for reply in met] == [0, 1]
    nodes = [0, 1] if os.environ[CHOSEN] == "ray" else [0, 0]
    assert [reply["node"] for reply in met] == nodes
    assert [reply["local_rank"] for reply in met] == ([0, 0] if nodes[1] else [0, 1])
    assert {(reply["num_ranks"], reply["met"]) for reply in met} == {(2, 2)}


@pytest.mark.parametrize("method", ["hidden", "close", "__init__", "total", "no_such"])
@ON_THIS_MACHINE
def test_only_what_is_offered_can_be_called(serve: Serve, method: str) -> None:
    group = serve(Heard())
    with group, pytest.raises(WorkerError, match=f"Server offers no method '{method}'"):
        group.call(method).replies()


def test_after_an_error_the_group_has_ended(serve: Serve) -> None:
    heard = Heard()
    group = serve(heard)
    waiting = group.call("fail")
    with pytest.raises(WorkerError, match=r"of counters failed: ValueError: not today") as caught:
        waiting.replies()
    assert "in fail" in caught.value.details
    for late in (waiting.replies, lambda: group.call("add", number=1)):
        with pytest.raises(WorkerError, match="counters has ended"):
            late()
    group.close()
    group.end()  # both may be called again
    assert not any("closed" in line for line in heard.lines)


def test_a_job_that_there_is_not_is_an_error_of_the_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(WorkerError, match="No module named 'rank_that_is_not_there'"):
        run("rank_that_is_not_there", tmp_path, 1)


@ON_THIS_MACHINE
def test_code_that_was_edited_is_loaded_anew(
    rank_module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two groups of one process, whatever was loaded for the first one."""
    monkeypatch.setattr("kdflow_core.workers.forking.ROOT", tmp_path)
    monkeypatch.setattr("kdflow_core.workers.forking.SOURCES", (".",))
    module = rank_module("import edited; (folder / edited.NAME).touch()")
    monkeypatch.setitem(LAUNCHERS, "local, forked", lambda: LocalLauncher(["numpy", "edited"]))
    for number in range(2):
        (tmp_path / "edited.py").write_text(f"NAME = 'seen-{number}'\n" + "#" * number)
        run(module, tmp_path, 1)
        assert (tmp_path / f"seen-{number}").exists()


@ON_THIS_MACHINE
def test_a_killed_fork_server_is_replaced(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    """Its next rank starts afresh, the one after that from a new server."""
    module = rank_module("(folder / f'parent-{os.getppid()}').touch()")
    for _ in range(3):
        run(module, tmp_path, 1)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.ZombieProcess):  # of another test in this process
                if FORK_SERVER in child.cmdline():
                    child.kill()
                    child.wait()
    parents = {int(file.name.removeprefix("parent-")) for file in tmp_path.glob("parent-*")}
    assert os.getpid() in parents
    assert len(parents) == (1 if os.environ[CHOSEN] == "local" else 3)


@ON_THIS_MACHINE
def test_a_fork_server_learns_what_a_later_rank_needs(
    rank_module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server for ranks of all needs; what it cannot load, it leaves to the rank."""
    for name in ("first", "second"):
        (tmp_path / f"needed_{name}.py").write_text(f"import os\nLOADED_BY = os.getpid() # {name}")
    body = """
    by = [sys.modules[name].LOADED_BY for name in sys.modules if name.startswith("needed_")]
    (folder / f"seen-{len(by)}-{set(by) <= {os.getppid()}}").touch()
    """
    module = rank_module(textwrap.dedent(body))
    needs: list[str] = []
    monkeypatch.setitem(LAUNCHERS, "local, forked", lambda: LocalLauncher(["numpy", *needs]))
    for names in ([], ["needed_first"], ["needed_second", "no_such_module"], ["needed_first"]):
        needs[:] = names
        run(module, tmp_path, 1)
    seen = {file.name for file in tmp_path.glob("seen-*")}
    all_of_them = {"seen-0-True", "seen-1-True", "seen-2-True"}
    assert seen == ({"seen-0-True"} if os.environ[CHOSEN] == "local" else all_of_them)
