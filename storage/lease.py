"""Who computes an artifact: one process at a time, on whatever machine.

A lease is a chain of small files `<name>.<generation>.json`, of which the last one counts. Taking
over creates the next generation, which only one can do; its holder rewrites its own file every
few seconds. Nobody compares clocks: a waiter takes a lease for dead when its file has not changed
for `TTL_S` seconds of the waiter's own clock, or at once when its holder was a process of this
machine that is gone.

Losing a lease loses no data: what a holder writes is created, not replaced, or has its checksum
recorded. It only means that something may be computed twice.
"""

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from storage.store import ArtifactStore

TTL_S = 60.0
RENEW_S = 10.0
POLL_S = 0.5
GENERATION = re.compile(r"\.(\d+)\.json$")


def lease_name(kind: str, digest: str) -> str:
    """The name of the lease that one has who computes an artifact."""
    return f"{kind}-{digest}"


@contextlib.contextmanager
def exclusive(
    store: ArtifactStore, name: str, on_wait: Callable[[str], None], *, ttl_s: float = TTL_S
) -> Iterator[None]:
    """Hold the lease `name`, waiting for another holder; `on_wait` is told once who that is."""
    lease = _Lease(store, name)
    while not lease.take():
        _wait(lease, on_wait, ttl_s)
    stop = threading.Event()
    renewal = threading.Thread(target=lease.renew_until, args=(stop,), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        stop.set()
        renewal.join()
        lease.release()


def is_held(store: ArtifactStore, name: str) -> bool:
    """Whether somebody holds the lease or a share of it, or did until their machine died."""
    paths = store.fs.glob(f"{store.root}/leases/{name}*.json")
    names = {GENERATION.sub("", str(path).rsplit("/", 1)[1]) for path in paths}
    states = (_Lease(store, found).current() for found in names)
    return any(state is not None and not state.is_free for state in states)


def _wait(lease: "_Lease", on_wait: Callable[[str], None], ttl_s: float) -> None:
    """Until the lease is free. What a dead holder has left is freed."""
    state, since = lease.current(), time.monotonic()
    if state is not None and not state.is_free:
        on_wait(state.holder)
    while state is not None and not state.is_free:
        time.sleep(POLL_S)
        last, state = state, lease.current()
        if state != last:
            since = time.monotonic()
        elif time.monotonic() - since > ttl_s:
            lease.ignore(last)
            return


class _State:
    """What the last file of a lease says."""

    def __init__(self, generation: int, content: bytes) -> None:
        self.generation = generation
        self._content = content
        try:
            fields = json.loads(content)
        except ValueError:  # being rewritten on a store without atomic writes
            fields = {}
        self.holder = f"process {fields.get('pid')} on {fields.get('host')}"
        self.is_free = bool(fields.get("released")) or _is_gone(fields)

    def __eq__(self, other: object) -> bool:
        mine = (self.generation, self._content)
        return isinstance(other, _State) and mine == (other.generation, other._content)

    __hash__ = None  # type: ignore[assignment]


class _Lease:
    def __init__(self, store: ArtifactStore, name: str) -> None:
        self._store = store
        self._prefix = f"{store.root}/leases/{name}"
        self._generation = 0
        self._ignored = -1
        self._me = {"id": uuid.uuid4().hex, **_process()}

    def _path(self, generation: int) -> str:
        return f"{self._prefix}.{generation}.json"

    def current(self) -> _State | None:
        """The last generation; None when there is none."""
        generations = self._generations()
        while generations:
            content = self._store.read_many([self._path(generations[-1])])
            if content:
                return _State(generations[-1], next(iter(content.values())))
            generations = self._generations()[:-1]
        return None

    def _generations(self) -> list[int]:
        folder = self._prefix.rsplit("/", 1)[0]
        self._store.fs.invalidate_cache(folder)
        paths = [str(path) for path in self._store.fs.glob(f"{self._prefix}.*.json")]
        return sorted(int(m.group(1)) for m in map(GENERATION.search, paths) if m)

    def ignore(self, state: _State) -> None:
        """Take a holder that no longer renews for dead."""
        self._ignored = state.generation

    def take(self) -> bool:
        """Try to become the holder."""
        last = self.current()
        if last is not None and not last.is_free and last.generation != self._ignored:
            return False
        generation = 0 if last is None else last.generation + 1
        if not self._store.create(self._path(generation), self._content(released=False)):
            return False
        self._generation = generation
        for old in self._generations():
            if old < generation:
                self._store.remove(self._path(old))
        return True

    def _content(self, *, released: bool) -> bytes:
        return json.dumps(self._me | {"released": released, "beat": uuid.uuid4().hex}).encode()

    def renew_until(self, stop: threading.Event) -> None:
        """Show that the holder lives, every few seconds."""
        while not stop.wait(RENEW_S):
            with contextlib.suppress(OSError):  # the store may be away for a moment
                self._rewrite(released=False)

    def release(self) -> None:
        """Let the next one in."""
        self._rewrite(released=True)

    def _rewrite(self, *, released: bool) -> None:
        path = self._path(self._generation)
        if self._store.fs.exists(path):  # else another has taken over
            self._store.write_whole(path, self._content(released=released))


def _process() -> dict[str, str | int | float]:
    return {
        "host": os.uname().nodename,
        "place": _place(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _place() -> str:
    """What must be equal for a process id to mean the same process: boot and pid name space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode()} {psutil.boot_time()}"


def _is_gone(holder: dict[str, str | int | float]) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    if holder.get("place") != _place():
        return False
    try:
        process = psutil.Process(int(holder["pid"]))
        same = bool(process.create_time() == holder["started"])
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
