"""How the student answers prompts between two rounds of training: an engine for generation that
takes new weights.
"""

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import MOST
from configs.schema.engines import SglangEngine, TransformersEngine


class TransformersRollout(TransformersEngine):
    """The reference. `bucket_mb` of new weights are handed over at a time, twice that are held."""

    bucket_mb: int = Field(default=256, gt=0, le=MOST)


class SglangRollout(SglangEngine):
    """SGLang's. New weights come `bucket_mb` at a time (twice that are held), through shared memory
    (`weights: tensor`), which also serves an engine on the student's own GPU, or by `broadcast`
    over NCCL or Gloo. With `sleep`, it leaves GPUs to teacher and student while they work.
    """

    bucket_mb: int = Field(default=256, gt=0, le=MOST)
    weights: Literal["tensor", "broadcast"] = "tensor"
    sleep: bool = False


Rollout = Annotated[TransformersRollout | SglangRollout, Field(discriminator="type")]
