"""How the student answers prompts between two rounds of training: a generation engine that takes
new weights.
"""

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import MOST, MOST_RANKS, StrictModel
from configs.schema.engines import SglangEngine, TransformersEngine


class _TakesWeights(StrictModel):
    """What an engine has beyond one that answers once."""

    num_engines: int | None = Field(default=None, gt=0, le=MOST_RANKS)
    """Engines that share a round's prompts, each with the whole student on GPUs of its own. By
    default as many as this machine has GPUs for (from `first_gpu` on), over Ray one, or with
    `placement: colocated` as many as the student's ranks have; one on a CPU. The answers do not
    depend on it.
    """
    bucket_mb: int = Field(default=256, gt=0, le=MOST)
    """How much of new weights is handed over at a time, in MB; twice that is held."""


class TransformersRollout(TransformersEngine, _TakesWeights):
    """The reference."""


class SglangRollout(SglangEngine, _TakesWeights):
    """SGLang's engine."""

    weights: Literal["tensor", "broadcast"] = "tensor"
    """How new weights travel: `tensor` (through the memory of the machine, and over Ray on to that
    of the engine's; also for an engine on the student's own GPU) or `broadcast` (from GPU to GPU by
    NCCL, or by Gloo).
    """
    sleep: bool = False
    """Leave the GPU to teacher and student while they work."""


Rollout = Annotated[TransformersRollout | SglangRollout, Field(discriminator="type")]
