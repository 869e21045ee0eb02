"""On-policy training: rounds in which the student answers, is scored, and learns."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, StrictModel
from configs.schema.rollout import Rollout, SglangRollout, TransformersRollout


class ConstantFraction(StrictModel):
    """The same share of every round's prompts is answered by the student, the rest keep the data's
    answers: GKD's lambda (arXiv 2306.13649, algorithm 1).
    """

    type: Literal["constant"] = "constant"
    value: float = Field(default=1.0, ge=0, le=1)


class LinearFraction(StrictModel):
    """The share goes from `start` in the first round to `end` in the last."""

    type: Literal["linear"] = "linear"
    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)


class AdaptiveFraction(StrictModel):
    """The share begins at `start` and grows by `step` after each round that ends with a held-out
    reverse KL of more than `tolerance` nats per token above the one it began with: the adaptive
    scheduler of DistiLLM (arXiv 2402.03898, section 3.2).
    """

    type: Literal["adaptive"] = "adaptive"
    start: float = Field(default=0.0, ge=0, le=1)
    step: float = Field(default=0.1, gt=0, le=1)
    tolerance: float = Field(default=0.0, ge=0)


Fraction = Annotated[
    ConstantFraction | LinearFraction | AdaptiveFraction, Field(discriminator="type")
]


class ReplayConfig(StrictModel):
    """Answers of the last `rounds` rounds are trained on again, `share` as many as are new. They
    are scored anew.
    """

    rounds: int = Field(default=1, gt=0, le=MOST)
    share: float = Field(default=0.5, gt=0)


class RewardConfig(StrictModel):
    """A Python function (prompt, answer, label) -> float, all text, in `file.py:name`; `label` is
    the data's `answer` or None. `weight` times a clipped policy gradient (PPO's surrogate, arXiv
    1707.06347, equation 7) joins the distillation loss. The advantage is the reward minus the mean
    over the answers to the same prompt (over the round, where each has one), divided by the
    standard deviation with `normalize` (GRPO, arXiv 2402.03300, section 4.1.2).
    """

    function: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")
    weight: float = Field(default=1.0, gt=0)
    normalize: bool = True
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)

    @property
    def path(self) -> str:
        """The file."""
        return self.function.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.rpartition(":")[2]


class OnPolicyConfig(StrictModel):
    """`rounds` rounds. In each, `prompts_per_round` prompts of the training data are taken, by
    `prompt_weights` of their sources or as they come; for a `fraction` of them the student samples
    `samples_per_prompt` answers; then it takes `steps_per_round` optimizer steps on these, the
    data's answers to the other prompts, and the `replay` (without a number: as many steps as one
    pass over the round's own answers has).

    Tokens are sampled at `temperature` from the `top_k` most probable (0: all) and the smallest set
    with probability `top_p`, by the run's seed. An answer ends at the end of its turn, or with
    `max_new_tokens`, and has then no end that is learned. When `collect_fraction` of a round's
    answers are finished, the engine may cut the others where they are (and leave out those without
    a token): a long one does not hold up the round.

    Round r + 1 may be rolled out while round r trains, by weights that are at most `max_staleness`
    rounds old; 0 is strictly on-policy. Each round ends with the loss of up to `heldout_sequences`
    held-out sequences (0: none). Every `checkpoint_rounds`-th ends with a checkpoint; a killed run
    trains the rounds after the last one again, on the answers that are there.
    """

    rounds: int = Field(gt=0, le=MOST)
    prompts_per_round: int = Field(gt=0, le=MOST)
    samples_per_prompt: int = Field(default=1, gt=0, le=MOST)
    steps_per_round: int | None = Field(default=None, gt=0, le=MOST)
    fraction: Fraction = Field(default_factory=ConstantFraction)
    prompt_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    replay: ReplayConfig | None = None
    reward: RewardConfig | None = None
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=MOST)
    max_new_tokens: int = Field(default=256, gt=0, le=MOST)
    collect_fraction: float = Field(default=1.0, gt=0, le=1)
    max_staleness: int = Field(default=0, ge=0, le=MOST)
    heldout_sequences: int = Field(default=64, ge=0, le=MOST)
    checkpoint_rounds: int = Field(default=1, gt=0, le=MOST)
    rollout: Rollout = Field(default_factory=TransformersRollout)

    @model_validator(mode="after")
    def _fits_together(self) -> "OnPolicyConfig":
        exact = self.temperature == 1 and self.top_p == 1 and self.top_k == 0
        if self.reward is not None and not exact:
            raise ValueError(
                "`reward` is learned by a policy gradient on what the student itself samples; it "
                "needs temperature=1, top_p=1 and top_k=0"
            )
        if isinstance(self.fraction, AdaptiveFraction) and not self.heldout_sequences:
            raise ValueError(
                "fraction.type=adaptive goes by the held-out loss; set `heldout_sequences`"
            )
        if self.max_staleness and isinstance(self.rollout, SglangRollout) and self.rollout.sleep:
            raise ValueError(
                "`max_staleness` rolls out while the student trains, and rollout.sleep leaves the "
                "device then; leave one of them out"
            )
        if self.prompt_weights is not None and not any(self.prompt_weights.values()):
            raise ValueError("`prompt_weights` are all 0; give one source a weight")
        return self

    @property
    def all_sampled(self) -> bool:
        """Whether the student answers every prompt itself."""
        return isinstance(self.fraction, ConstantFraction) and self.fraction.value == 1

    def steps(self, global_batch_size: int) -> int:
        """The optimizer steps of a round."""
        if self.steps_per_round is not None:
            return self.steps_per_round
        return -(-self.prompts_per_round * self.samples_per_prompt // global_batch_size)
