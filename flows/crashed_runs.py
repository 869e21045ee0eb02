"""Flow runs whose process is gone, and which Prefect still shows as running.

A run of this machine leaves a mark in its scratch folder while it works. The next one that starts
there looks whose process has gone, and sets their state.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from storage.process import is_gone, mark_of_this_process

FOLDER = "flow-runs"


@contextmanager
def marked(scratch: str, flow_run_id: UUID | None) -> Iterator[None]:
    """Within, a flow run of this process can be told from one whose process is gone."""
    if flow_run_id is None:  # not under Prefect
        yield
        return
    path = Path(scratch) / FOLDER / f"{flow_run_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mark_of_this_process()), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def set_crashed(scratch: str) -> int:
    """Set the state of the runs whose process is gone; how many there were."""
    gone = [path for path in (Path(scratch) / FOLDER).glob("*.json") if _is_of_a_gone(path)]
    if not gone:
        return 0
    with get_client(sync_client=True) as client:
        for path in list(gone):
            try:
                _crash(client, UUID(path.stem))
            except httpx.HTTPError:  # not worth a run; the next one will try
                gone.remove(path)
                continue
            path.unlink(missing_ok=True)
    return len(gone)


def _is_of_a_gone(path: Path) -> bool:
    try:
        UUID(path.stem)
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # not ours, or being written
    return isinstance(mark, dict) and is_gone(mark)


def _crash(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """A run and its subflows, unless they have ended."""
    below = FlowRunFilterParentFlowRunId(any_=[flow_run_id])
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=below))
    own = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    for run in (*runs, *client.read_flow_runs(flow_run_filter=own)):
        if run.state is None or run.state.is_final() or run.state.is_scheduled():
            continue
        message = "The process of this run is gone; seen by the next run."
        with suppress(ObjectNotFound):  # deleted meanwhile
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
