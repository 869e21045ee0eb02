"""Where the ranks of a run are started."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, StrictModel
from configs.schema.engines import SglangEngine
from configs.schema.rollout import SglangRollout

if TYPE_CHECKING:
    from configs.schema.run import RunConfig


class LocalWorkers(StrictModel):
    """On this machine."""

    type: Literal["local"] = "local"


class RayWorkers(StrictModel):
    """On the machines of a Ray cluster (`pip install -e '.[ray]'` on each of them), of which this
    one is a node. All have this program in the same version, and see the store and the scratch
    folder under the same names.
    """

    type: Literal["ray"]
    address: str = Field(default="auto", pattern=r"^(auto|[^/\s:]+:[0-9]+)$")
    """Where the cluster's head is, as `host:port`; `auto`: that of the node on this machine."""
    strategy: Literal["pack", "spread"] = "pack"
    """Whether ranks go onto as few machines as have room for them, or onto as many."""
    placement: Literal["separate", "colocated"] = "separate"
    """Where rollout engines are: on GPUs of their own, or on those of the ranks that train, with
    which they take turns (`rollout.sleep`, `student.sleep` and `teacher.sleep` say who leaves).
    """
    cpus_per_rank: int = Field(default=1, gt=0, le=MOST)
    """CPUs that Ray sets aside for each rank."""
    gpus_per_rank: int | None = Field(default=None, ge=0, le=MOST)
    """GPUs that Ray sets aside for each rank; by default as many as a rank uses where the cluster
    has any.
    """
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the ranks; their values are not recorded. Those of this process that
    tell libraries where things are (AWS_, HF_, KDFLOW_, NCCL_, PYTHONPATH and the like) go with
    them anyway.
    """
    start_timeout_s: float = Field(default=600, gt=0)
    """After how many seconds without room for its ranks a stage ends, which is then tried again."""
    require_token: bool = True
    """Refuse a cluster that anyone who reaches its ports can run code on: Ray listens on all
    interfaces, and asks for nothing unless RAY_AUTH_MODE=token is set on all nodes and here.
    """

    @model_validator(mode="after")
    def _own_address(self) -> "RayWorkers":
        host = self.address.partition(":")[0]
        if host in ("localhost", "127.0.0.1"):
            raise ValueError(
                f"address={self.address}: Ray gives a node its network address, under which it "
                "must be reached; use that one (`ray status` shows it), or `auto`"
            )
        return self


Workers = Annotated[LocalWorkers | RayWorkers, Field(discriminator="type")]


def check_over_nodes(run: "RunConfig") -> None:
    """Refuse engines that a cluster cannot have where they are asked for. Raises ValueError."""
    answers, rounds = run.data.answers, run.on_policy
    engines = {
        "data.answers.engine": None if answers is None else answers.engine,
        "on_policy.rollout": None if rounds is None else rounds.rollout,
    }
    for field, engine in engines.items():
        if isinstance(engine, SglangEngine) and engine.first_gpu:
            raise ValueError(
                f"{field}.first_gpu={engine.first_gpu} counts the GPUs of one machine, and with "
                "workers.type=ray an engine has those that Ray gives it; leave it out"
            )
    if not run.engines_beside_student:
        return
    if rounds is None:
        raise ValueError(
            "workers.placement=colocated is about rollout engines, which `mode: onpolicy` has; "
            "leave it out"
        )
    rollout = rounds.rollout
    if isinstance(rollout, SglangRollout) and rollout.weights == "broadcast":
        raise ValueError(
            "on_policy.rollout.weights=broadcast goes between GPUs, and workers.placement="
            "colocated has engine and student on the same ones; set it to tensor"
        )
    room = run.student.num_ranks // rollout.ranks_per_replica
    if run.rollout_engines(0) > room:
        raise ValueError(
            "workers.placement=colocated has rollout engines on the GPUs of the student, and "
            f"student.num_ranks={run.student.num_ranks} has room for {room} of "
            f"{rollout.ranks_per_replica} GPUs each; lower on_policy.rollout.num_engines or "
            "tensor_parallel, or raise student.num_ranks"
        )
