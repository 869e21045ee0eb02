"""The contract between a caller that has work and the ranks that do it.

A launcher starts ranks; each makes a host of its own, by the name of a job, and serves the methods
that the host offers until the group is closed. Whatever goes between them is JSON.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict

STALL_S = 1800.0
_OFFERED = "__offered__"
F = TypeVar("F", bound=Callable[..., Any])


class RankContext(BaseModel):
    """Where a rank stands among the ranks of its group.

    It `sees_own_devices` where it has accelerators of its own, and the others are hidden from it.
    `rendezvous` is what `torch.distributed` calls an init method, `address` the host name under
    which processes of other groups reach this rank's machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = 0
    local_rank: int = 0
    node: int = 0
    num_ranks: int = 1
    sees_own_devices: bool = False
    rendezvous: str = ""
    address: str = ""

    @property
    def rank_among_devices(self) -> int | None:
        """The rank, where all of them see the same accelerators; None: it sees its own alone."""
        return None if self.sees_own_devices else self.rank


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many ranks a group has, how many accelerators each uses where there are any, and what of
    the environment is set for them where it is not.

    `name` is what messages call the group. Its ranks use accelerators of their own, or those of the
    group that they are `beside`, which the same launcher has started; on one machine, all groups
    see all of them.
    """

    name: str
    num_ranks: int = 1
    devices: int = 1
    beside: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


class Events(Protocol):
    """A listener to a group's events. Called in the thread that waits for the group."""

    def event(self, event: dict[str, Any]) -> None:
        """What a rank has emitted: `event` is its kind, the rest is its own."""
        ...

    def line(self, rank: int, text: str) -> None:
        """Any other line that a rank has printed."""
        ...

    def beat(self) -> None:
        """Ranks are alive."""
        ...


class Pending(Protocol):
    """A call that was made."""

    def replies(self) -> list[Any]:
        """Wait for every rank's, in their order. Raises WorkerError when a rank fails, dies or
        stands still; all ranks have then ended.
        """
        ...


class WorkerGroup(Protocol):
    """Ranks at work. Used as a context manager, or closed; after an error, it is ended."""

    def call(self, method: str, **arguments: Any) -> Pending:
        """Have every rank call a method that its host offers. Ranks take calls in order."""
        ...

    def close(self) -> None:
        """Let the ranks finish what they were asked for and leave. May be called twice."""
        ...

    def end(self) -> None:
        """End the ranks wherever they are. May be called twice."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Launcher(Protocol):
    """Starts groups.

    `one_machine` says that all groups share memory and local folders.
    """

    @property
    def one_machine(self) -> bool:
        """Whether what a rank writes to a local folder or shared memory, all others see."""
        ...

    def start(
        self,
        job: str,
        spec: str,
        placement: Placement,
        events: Events,
        *,
        stall_s: float = STALL_S,
    ) -> WorkerGroup:
        """Ranks whose hosts are made by `job`, a `"module:function"` of the rank's context and the
        `spec`. When all that are at work stand still for `stall_s` seconds, the group ends.
        """
        ...


class Host(Protocol):
    """What a rank is. Its methods that are `offered` can be called from outside."""

    def close(self) -> None:
        """Called when the group is closed in good order."""
        ...


def offered(method: F) -> F:
    """Mark a method of a host as one that may be called from outside."""
    setattr(method, _OFFERED, True)
    return method


def offered_method(host: Host, name: str) -> Callable[..., Any]:
    """A method that a host offers. Raises AttributeError for any other."""
    declared = getattr(type(host), name, None)
    if not getattr(declared, _OFFERED, False):
        raise AttributeError(f"{type(host).__name__} offers no method '{name}'")
    method: Callable[..., Any] = getattr(host, name)
    return method


Role = Literal["call", "leave", "stop"]


class Request(BaseModel):
    """What goes to a rank: a call by its number, the end, or that it is to stop at the next place
    where it can, whatever it is at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role = "call"
    number: int = 0
    method: str = ""
    arguments: dict[str, Any] = {}


class Start(BaseModel):
    """The first thing that goes to a rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: RankContext
    job: str
    spec: str
