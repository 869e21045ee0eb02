"""Work over several processes: in order, with its errors, and with nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kdflow_core.data.many_cores import AHEAD, BATCH, in_order
from kdflow_core.errors import DataError
from tests.processes import wait_until_gone
from tests.readme import ROOT


@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 10, 11, 60, 61, 1234])
def test_results_are_in_order(cores: int, count: int) -> None:
    def square(number: int) -> int:
        if number % 100 == 0:
            time.sleep(0.01)  # so that later ones are done before
        return number * number

    found = list(in_order(square, range(count), cores=cores, alone=10))
    assert found == [number * number for number in range(count)]


def test_the_work_is_done_by_others() -> None:
    def work(number: int) -> int:
        time.sleep(0.001)
        return os.getpid()

    pids = list(in_order(work, range(1000), cores=2, alone=100))
    assert set(pids[:100]) == {os.getpid()}
    assert os.getpid() not in pids[100:]
    assert len(set(pids[100:])) == 2


def test_no_more_is_read_ahead_than_is_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100_000):
            taken = number + 1
            yield number

    results = in_order(lambda number: number, items(), cores=2, alone=0)
    for number in range(500):
        assert next(results) == number
        assert taken <= number + BATCH * (2 * AHEAD + 2)
    results.close()


def test_an_error_ends_it_with_its_processes() -> None:
    def work(number: int) -> int:
        return 1 // (300 - number)

    results = in_order(work, range(10_000), cores=2, alone=0)
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert not [p for p in psutil.Process().children() if p.status() == psutil.STATUS_RUNNING]


def test_a_killed_process_is_told() -> None:
    parent = os.getpid()

    def work(number: int) -> int:
        if number == 400 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match="was killed"):
        list(in_order(work, range(1000), cores=2, alone=0))


PARENT = """
import os, sys, time
from pathlib import Path
from kdflow_core.data.many_cores import in_order

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.01)
    return number

for _ in in_order(work, range(10**6), cores=2, alone=0):
    pass
"""


def test_its_processes_end_with_it(tmp_path: Path) -> None:
    """However it ends: they hold its output, for whose end its launcher waits."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    assert parent.communicate(timeout=10)[0] == b""
    wait_until_gone([int(file.name) for file in tmp_path.iterdir()])
