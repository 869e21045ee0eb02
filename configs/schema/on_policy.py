"""On-policy training: rounds in which the student answers, is scored, and learns."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import MOST, PythonFunction, StrictModel
from configs.schema.rollout import Rollout, SglangRollout, TransformersRollout

if TYPE_CHECKING:
    from configs.schema.run import RunConfig


class ConstantFraction(StrictModel):
    """The same share of every round's prompts is answered by the student, the rest keep the data's
    answers: GKD's lambda (arXiv 2306.13649, algorithm 1).
    """

    type: Literal["constant"] = "constant"
    value: float = Field(default=1.0, ge=0, le=1)
    """The share."""


class LinearFraction(StrictModel):
    """The share goes from `start` in the first round to `end` in the last."""

    type: Literal["linear"] = "linear"
    start: float = Field(ge=0, le=1)
    """The share in the first round."""
    end: float = Field(ge=0, le=1)
    """The share in the last round."""


class AdaptiveFraction(StrictModel):
    """The share begins at `start` and grows by `step` after each round that ends with a held-out
    reverse KL of more than `tolerance` nats per token above the one it began with: the adaptive
    scheduler of DistiLLM (arXiv 2402.03898, section 3.2).
    """

    type: Literal["adaptive"] = "adaptive"
    start: float = Field(default=0.0, ge=0, le=1)
    """The share in the first round."""
    step: float = Field(default=0.1, gt=0, le=1)
    """By how much it grows."""
    tolerance: float = Field(default=0.0, ge=0)
    """By how many nats per token the held-out loss may rise without that."""


Fraction = Annotated[
    ConstantFraction | LinearFraction | AdaptiveFraction, Field(discriminator="type")
]


class ReplayConfig(StrictModel):
    """Answers of earlier rounds that are trained on again."""

    rounds: int = Field(default=1, gt=0, le=MOST)
    """From how many earlier rounds answers are taken."""
    ratio: float = Field(default=0.5, gt=0)
    """How many of them, as a ratio to the new ones."""


class RewardConfig(StrictModel):
    """A Python function (prompt, answer, label) -> float, all text, in `file.py:name`; `label` is
    the data's `answer` or None. `weight` times a clipped policy gradient (PPO's surrogate, arXiv
    1707.06347, equation 7) joins the distillation loss. The advantage is the reward minus the mean
    over the answers to the same prompt (over the round, where each has one), divided by the
    standard deviation with `normalize` (GRPO, arXiv 2402.03300, section 4.1.2).
    """

    function: PythonFunction
    """The function, as `file.py:name`: text of prompt, answer and label (the data's `answer`, or
    None) to a number.
    """
    weight: float = Field(default=1.0, gt=0)
    """The weight of the policy gradient beside the distillation loss."""
    normalize: bool = True
    """Divide advantages by the standard deviation of the rewards of one prompt's answers."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """How far below 1 the importance ratio may be."""
    clip_high: float = Field(default=0.2, gt=0)
    """How far above 1 the importance ratio may be."""


class OnPolicyConfig(StrictModel):
    """Rounds of rolling out, scoring and training.

    In each, prompts of the training data are taken; the student answers a share of them; then it
    takes optimizer steps on these answers, on the data's answers to the other prompts, and on what
    is replayed. Tokens are sampled by the run's seed. An answer ends at the end of its turn; one
    that is cut, or reaches its longest length, has no end that is learned.
    """

    rounds: int = Field(gt=0, le=MOST)
    """How many rounds."""
    prompts_per_round: int = Field(gt=0, le=MOST)
    """How many prompts of the training data a round takes."""
    samples_per_prompt: int = Field(default=1, gt=0, le=MOST)
    """How many answers the student samples to a prompt."""
    steps_per_round: int | None = Field(default=None, gt=0, le=MOST)
    """Optimizer steps of a round; by default one pass over its own answers."""
    fraction: Fraction = Field(default_factory=ConstantFraction)
    """The share of the prompts that the student answers, the others keep the data's answers:
    `constant`, `linear` or `adaptive` (DistiLLM's).
    """
    prompt_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """How often each data source's prompts come; by default as they are in the data."""
    replay: ReplayConfig | None = None
    """Answers of earlier rounds that are trained on again; they are scored anew."""
    reward: RewardConfig | None = None
    """A Python function of prompt, answer and label, `{function: my_rewards.py:right}`, that joins
    the loss as a policy gradient.
    """
    temperature: float = Field(default=1.0, gt=0)
    """The sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(default=0, ge=0, le=MOST)
    """Sample from so many tokens; 0: from all."""
    max_new_tokens: int = Field(default=256, gt=0, le=MOST)
    """The longest answer, in tokens."""
    collect_fraction: float = Field(default=1.0, gt=0, le=1)
    """Below 1: when so many answers are finished, the others are cut where they are."""
    max_staleness: int = Field(default=0, ge=0, le=MOST)
    """1 or more: roll out the next rounds while this one trains, by weights that are so many rounds
    old.
    """
    heldout_sequences: int = Field(default=64, ge=0, le=MOST)
    """On how many held-out samples the loss is measured after each round; 0 turns it off."""
    checkpoint_rounds: int = Field(default=1, gt=0, le=MOST)
    """How many rounds lie between two checkpoints; a killed run trains the rounds after the last
    one again, on the answers that are there.
    """
    rollout: Rollout = Field(default_factory=TransformersRollout)
    """What runs the student when it answers: `{type: sglang}` (continuous batching, in processes of
    its own) or `{type: transformers}` (the reference).
    """

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
        if self.rollout.num_engines is not None and self.rollout.num_engines > self._shares:
            together = (
                "batches of rollout.prompts_per_batch"
                if isinstance(self.rollout, TransformersRollout)
                else "prompts"
            )
            raise ValueError(
                f"rollout.num_engines={self.rollout.num_engines}: a round has only {self._shares} "
                f"of the {together} that engines share; lower it, or raise prompts_per_round"
            )
        return self

    def engines_on(self, gpus: int) -> int:
        """The rollout engines where there are so many GPUs for all of them; 0: none, or not ours to
        count.
        """
        rollout = self.rollout
        if rollout.num_engines is not None:
            return rollout.num_engines
        first = rollout.first_gpu if isinstance(rollout, SglangRollout) else 0
        return max(1, min((gpus - first) // rollout.ranks_per_replica, self._shares))

    @property
    def _shares(self) -> int:
        """Into so many a round's answers can be divided."""
        return -(-self.prompts_per_round * self.samples_per_prompt // self.answers_together)

    @property
    def answers_together(self) -> int:
        """So many of a round's answers in a row are given by one engine, however many there are:
        a batch, or those to one prompt, whose cache they share.
        """
        if isinstance(self.rollout, TransformersRollout):
            return self.rollout.prompts_per_batch
        return self.samples_per_prompt

    @property
    def all_sampled(self) -> bool:
        """Whether the student answers every prompt itself."""
        return isinstance(self.fraction, ConstantFraction) and self.fraction.value == 1

    def steps(self, global_batch_size: int) -> int:
        """The optimizer steps of a round."""
        if self.steps_per_round is not None:
            return self.steps_per_round
        return -(-self.prompts_per_round * self.samples_per_prompt // global_batch_size)


def check_on_policy(run: "RunConfig", on_policy: OnPolicyConfig) -> None:
    """Refuse sections of an on-policy run that do not fit it. Raises ValueError."""
    if run.delivery != "replay":
        raise ValueError("`delivery` is for `mode: offpolicy`; leave it out")
    if run.data.answers is not None and run.data.answers.fraction != 1:
        raise ValueError(
            "data.answers.fraction is for `mode: offpolicy`; here only prompts without an answer "
            "get one, and on_policy.fraction says how many the student answers; leave it out"
        )
    if run.algorithm.type in {"sft", "multi_teacher"}:
        raise ValueError(
            f"algorithm.type={run.algorithm.type} is not for `mode: onpolicy`, which has "
            "vanilla_kd, dual_space, gold and self_distillation"
        )
    if run.eval.patience is not None:
        raise ValueError("eval.patience is for `mode: offpolicy`; on_policy.rounds says how many")
    if run.eval.keep_best is not None and not on_policy.heldout_sequences:
        raise ValueError(
            f"eval.keep_best={run.eval.keep_best} goes by what rounds measure on held-out samples; "
            "set on_policy.heldout_sequences"
        )
    if run.student.shuffle_window_shards is not None:
        raise ValueError(
            "student.shuffle_window_shards is about stored states, and `mode: onpolicy` stores none"
        )
    if on_policy.max_staleness and run.student.sleep:
        raise ValueError(
            "on_policy.max_staleness trains while the next round is rolled out, and student.sleep "
            "sleeps then; leave one of them out"
        )
    if on_policy.prompt_weights is not None:
        unknown = sorted(set(on_policy.prompt_weights) - set(run.data.source_names))
        if unknown:
            raise ValueError(
                f"on_policy.prompt_weights names {unknown}; the data sources are "
                f"{sorted(run.data.source_names)}"
            )


def check_samples(on_policy: OnPolicyConfig, setting: str, temperature: float) -> None:
    """Refuse samples that a `setting` at a temperature cannot learn from. Raises ValueError."""
    whole = on_policy.top_p == 1 and on_policy.top_k == 0
    if not (on_policy.all_sampled and whole and on_policy.temperature == temperature):
        raise ValueError(
            f"{setting} learns from what the student has sampled; set on_policy.fraction to the "
            "constant 1, top_p=1, top_k=0 and the divergence's own temperature "
            f"({temperature:g})"
        )
