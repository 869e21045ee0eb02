"""Who computes an artifact: one process at a time, on whatever machine.

A lease is a chain of small files `<name>.<generation>.json`, of which the last one counts. Taking
over creates the next generation, which only one can do; its holder rewrites its own file every
few seconds, as long as its work goes on. Nobody compares clocks: a waiter takes a lease for dead
when its file has not changed for `TTL_S` seconds of the waiter's own clock, or at once when its
holder was a process of this machine that is gone.

Losing a lease loses no data: what a holder writes is created, not replaced, or has its checksum
recorded. It only means that something may be computed twice.
"""

import contextlib
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from storage.process import is_gone, mark_of_this_process
from storage.store import ArtifactStore

TTL_S = 60.0
RENEW_S = 10.0
POLL_S = 0.5
GENERATION = re.compile(r"\.(\d+)\.json$")


def lease_name(kind: str, digest: str) -> str:
    """The name of the lease held by whoever computes an artifact."""
    return f"{kind}-{digest}"


class Pulse:
    """The progress of a lease's holder: without a touch for `idle_s` seconds, its lease runs out,
    even though the holder is there.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._last = time.monotonic()

    def touch(self) -> None:
        """Say that work goes on."""
        self._last = time.monotonic()

    def is_there(self) -> bool:
        """Whether it does."""
        return time.monotonic() - self._last < self._idle_s


@contextlib.contextmanager
def exclusive(
    store: ArtifactStore,
    name: str,
    on_wait: Callable[[str], None],
    *,
    ttl_s: float = TTL_S,
    idle_s: float = math.inf,
) -> Iterator[Pulse]:
    """Hold the lease `name`, waiting for another holder; `on_wait` is told once who that is. What
    is yielded is to be touched at least every `idle_s` seconds.
    """
    lease = _Lease(store, name)
    while not lease.take():
        _wait(lease, on_wait, ttl_s)
    stop, pulse = threading.Event(), Pulse(idle_s)
    renewal = threading.Thread(target=lease.renew_until, args=(stop, pulse), daemon=True)
    renewal.start()
    try:
        yield pulse
    finally:
        stop.set()
        renewal.join()
        lease.release()


def is_held(store: ArtifactStore, name: str) -> bool:
    """Whether somebody holds the lease or a portion of it, or did until their machine died."""
    return bool(held_leases(store, name))


def held_leases(store: ArtifactStore, prefix: str = "") -> set[str]:
    """The names of the leases that begin with `prefix` and somebody holds."""
    names = {GENERATION.sub("", name) for name in _names(store) if name.startswith(prefix)}
    states = {name: _Lease(store, name).current() for name in names}
    return {name for name, state in states.items() if state is not None and not state.is_free}


def forget_leases(store: ArtifactStore, prefix: str) -> None:
    """Remove the files of the leases that begin with `prefix`."""
    for name in _names(store):
        if name.startswith(prefix):
            store.remove(f"{_folder(store)}/{name}")


def _folder(store: ArtifactStore) -> str:
    return f"{store.root}/leases"


def _names(store: ArtifactStore) -> list[str]:
    """The names of the lease files; none of them is a pattern."""
    return [name for name in store.list_names(_folder(store)) if GENERATION.search(name)]


def _wait(lease: "_Lease", on_wait: Callable[[str], None], ttl_s: float) -> None:
    """Wait until the lease is free; a dead holder's is freed."""
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
        if not isinstance(fields, dict):
            fields = {}
        self.holder = f"process {fields.get('pid')} on {fields.get('host')}"
        self.is_free = bool(fields.get("released")) or is_gone(fields)

    def __eq__(self, other: object) -> bool:
        mine = (self.generation, self._content)
        return isinstance(other, _State) and mine == (other.generation, other._content)

    __hash__ = None  # type: ignore[assignment]


class _Lease:
    def __init__(self, store: ArtifactStore, name: str) -> None:
        self._store = store
        self._name = name
        self._generation = 0
        self._ignored = -1
        self._me = {"id": uuid.uuid4().hex, **mark_of_this_process()}

    def _path(self, generation: int) -> str:
        return f"{_folder(self._store)}/{self._name}.{generation}.json"

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
        found = [
            int(match.group(1))
            for name in _names(self._store)
            if (match := GENERATION.search(name)) and name[: match.start()] == self._name
        ]
        return sorted(found)

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

    def renew_until(self, stop: threading.Event, pulse: Pulse) -> None:
        """Show that the holder lives and works, every few seconds."""
        while not stop.wait(RENEW_S):
            if not pulse.is_there():
                continue
            with contextlib.suppress(OSError):  # the store may be away for a moment
                self._rewrite(released=False)

    def release(self) -> None:
        """Let the next one in."""
        self._rewrite(released=True)

    def _rewrite(self, *, released: bool) -> None:
        path = self._path(self._generation)
        if self._store.fs.exists(path):  # else another has taken over
            self._store.write_whole(path, self._content(released=released))
