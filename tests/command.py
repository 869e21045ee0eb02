"""`kdflow` with arguments, in the process of the test that gives the command.

A process of its own loads Prefect, and what its ranks are forked from: 15 s of a core, here once
for all tests of a process. What a process has of its own (signals, its death) needs one: see
`tests/terminal`.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

import pytest

from flows.cli import console, main

LOGGERS = ("prefect.flow_runs", "prefect.task_runs")


@contextlib.contextmanager
def _logs(output: io.StringIO) -> Iterator[None]:
    """Have what flows and tasks log there, too."""
    from prefect.logging.configuration import setup_logging
    from prefect.logging.formatters import PrefectFormatter

    setup_logging()  # the first time, it takes away the handlers that are there
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        PrefectFormatter(
            "%(message)s",
            flow_run_fmt="Flow run %(flow_run_name)r - %(message)s",
            task_run_fmt="Task run %(task_run_name)r - %(message)s",
        )
    )
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


def kdflow(*arguments: str, code: int = 0) -> str:
    """What the command prints and logs. Asserts its exit code."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, _logs(output):
        patch.setattr(sys, "argv", ["kdflow", *arguments])
        patch.setattr(console, "width", 200)
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            pytest.raises(SystemExit) as end,
        ):
            main()
    assert (end.value.code or 0) == code, output.getvalue()
    return output.getvalue()
