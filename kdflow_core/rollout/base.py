"""What a rollout engine is: prompts' ids and new weights in, answers' ids out.

Dimensions: T tokens of a prompt, N tokens of an answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdflow_core.weight_buckets import Bucket

FinishReason = Literal["stop", "length", "cut"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: at `temperature`, from the `top_k` most probable ones (0: all) and
    the smallest set with probability `top_p`; at temperature 0, the most probable one. An answer
    ends with one of `stop_ids`, which belongs to it. Without `log_probs`, completions have none.
    """

    stop_ids: tuple[int, ...]
    log_probs: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Ids [T], and how many tokens an answer may have: one at least."""

    ids_T: np.ndarray
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer: ids int32 [N]; the log-probability of each, in nats, float32 [N], at the
    sampling temperature (at 1 where that is 0) over the whole vocabulary; why it ended (`cut`: it
    was stopped for the sake of others); and the version of the weights that wrote it.
    """

    ids_N: np.ndarray
    log_prob_N: np.ndarray | None
    finish_reason: FinishReason
    version: int


class RolloutEngine(Protocol):
    """A model that answers prompts and takes new weights.

    Weights come under the names that the model's checkpoint has: `begin_weights`, then
    `load_weights` as often as it takes, then `end_weights`.
    """

    @property
    def version(self) -> int:
        """The version of the weights that it serves; 0 for those that it was started with."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        places: Sequence[int] | None = None,
        enough: float = 1.0,
    ) -> Iterator[tuple[int, Completion]]:
        """Answers, each with its prompt's index, as they are finished. The same `seed` gives the
        same ones, as far as rounding does, which may depend on what is computed together. Where
        several engines share what a seed is for, `places` are these prompts' among all of them.

        When a share `enough` of them is, an engine may cut the others where they are; one that has
        no token yet is left out.
        """
        ...

    def begin_weights(self) -> None:
        """New weights will come; until `end_weights` there are no answers. An engine that sleeps
        takes no more of the device for them than they need.
        """
        ...

    def load_weights(self, bucket: Bucket) -> None:
        """Some of the new weights; whole tensors, which are copied. Raises ModelError."""
        ...

    def end_weights(self, version: int) -> None:
        """Serve the new weights. Raises ModelError when some have not arrived."""
        ...

    def sleep(self) -> None:
        """Leave the device. May be called twice."""
        ...

    def wake(self) -> None:
        """Come back to the device. May be called when awake."""
        ...

    def close(self) -> None:
        """Free the model. May be called twice."""
        ...
