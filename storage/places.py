"""Whether the places that a run names can be used: asked before anything is computed."""

import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from configs.secrets import public
from storage.errors import StoreError
from storage.store import ArtifactStore

ANSWER_S = 30.0


def check_places(store: ArtifactStore) -> None:
    """Refuse a scratch folder that cannot be written and a store that cannot be read.

    Raises StoreError, which names the field.
    """
    try:
        store.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.scratch) as file:
            file.write(b"x")
    except OSError as error:
        raise StoreError(
            f"storage.scratch={store.scratch} cannot be written ({_reason(error)}); set it to a "
            "folder of your own"
        ) from error
    if store.is_local:
        _check_local(Path(store.root))
    else:
        _within_time(store, lambda: store.list_names(store.root), "read")


def check_writable(store: ArtifactStore) -> None:
    """Refuse a store that new artifacts cannot be written to. Raises StoreError."""
    path = f"{store.root}/.kdflow-{uuid.uuid4().hex}"

    def probe() -> None:
        store.write_whole(path, b"x")
        store.remove(path)

    if store.is_local:
        try:
            probe()
        except (OSError, StoreError) as error:
            raise StoreError(_refusal(store, "written", _reason(error))) from error
    else:
        _within_time(store, probe, "written")


def _check_local(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with os.scandir(root) as entries:
            next(entries, None)
    except OSError as error:
        raise StoreError(
            f"storage.root={root} cannot be used ({_reason(error)}); set it to a folder that you "
            "may read, or an fsspec URL"
        ) from error


def _within_time(store: ArtifactStore, work: Callable[[], object], what: str) -> None:
    """Bounds a check of a remote store: it answers soon, refuses for a reason, or is not there."""
    failure: list[Exception] = []

    def run() -> None:
        try:
            work()
        except (OSError, StoreError, ValueError) as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if thread.is_alive():
        raise StoreError(_refusal(store, what, f"no answer within {ANSWER_S:.0f} s"))
    if failure:
        raise StoreError(_refusal(store, what, _reason(failure[0]))) from failure[0]


def _refusal(store: ArtifactStore, what: str, why: str) -> str:
    place = store.root if store.is_local else public(str(store.fs.unstrip_protocol(store.root)))
    return (
        f"storage.root={place} cannot be {what} ({why}); check the address and the rights, or "
        "set it to another place"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
