"""How the student answers prompts between two rounds of training: a generation engine that takes
new weights.
"""

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import MOST
from configs.schema.engines import SglangEngine, TransformersEngine


class TransformersRollout(TransformersEngine):
    """The reference."""

    bucket_mb: int = Field(default=256, gt=0, le=MOST)
    """How much of new weights is handed over at a time, in MB; twice that is held."""


class SglangRollout(SglangEngine):
    """SGLang's engine."""

    bucket_mb: int = Field(default=256, gt=0, le=MOST)
    """How much of new weights is handed over at a time, in MB; twice that is held."""
    weights: Literal["tensor", "broadcast"] = "tensor"
    """How new weights travel: `tensor` (shared memory, also for an engine on the student's own GPU)
    or `broadcast` (NCCL or Gloo).
    """
    sleep: bool = False
    """Leave the GPU to teacher and student while they work."""


Rollout = Annotated[TransformersRollout | SglangRollout, Field(discriminator="type")]
