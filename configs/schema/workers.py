"""Where the ranks of a run are started."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, StrictModel


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
