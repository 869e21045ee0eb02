"""What goes between the parts of an on-policy run, and what is kept of a round."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.schema.on_policy import AdaptiveFraction, ConstantFraction, OnPolicyConfig
from storage.artifact import ArtifactRef

ROUND_FILE = "round.json"
ROUNDS_FILE = "rounds.jsonl"  # of a trained student


class RoundRequest(BaseModel):
    """A round to score or train: its answers, and those of earlier rounds to replay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    fraction: float
    rollouts: ArtifactRef
    replayed: tuple[ArtifactRef, ...] = ()


class RoundRecord(BaseModel):
    """A round that is done. Divergences are in nats per token, times in seconds.

    `version` is that of the weights that wrote the answers: the round that they were trained in (0:
    none). `log_prob_difference` compares the engine's log-probabilities of its samples with the
    trainer's. `translated` is what became of the answers on their way to a teacher with another
    tokenizer. `seconds` has the parts of the round as the flow saw them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    fraction: float
    version: int
    staleness: int
    answers: int
    answer_tokens: int
    mean_length: float
    longest: int
    finish_reasons: dict[str, int]
    reward_mean: float | None
    last_step: int
    loss: float
    kd: float
    log_prob_difference: dict[str, float] | None
    heldout_before: dict[str, float] | None
    heldout: dict[str, float] | None
    translated: dict[str, int] | None = None
    seconds: dict[str, float]


def round_figures(result: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, float]:
    """What there is to plot of a round, of what its training and its rollouts tell."""
    figures: dict[str, float] = {"fraction": info["fraction"], "length": info["mean_length"]}
    heldout = result["heldout"] or {}
    figures |= {f"heldout_{name}": v for name, v in heldout.items() if name != "num_tokens"}
    if result["log_prob_difference"] is not None:
        figures["log_prob_difference"] = result["log_prob_difference"]["mean"]
    if info["reward_mean"] is not None:
        figures["reward"] = info["reward_mean"]
    return figures


def read_rounds(folder: Path) -> list[RoundRecord]:
    """The rounds that a student was trained in; none for one that was trained off-policy."""
    path = folder / ROUNDS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [RoundRecord.model_validate_json(line) for line in lines]


def next_fraction(config: OnPolicyConfig, number: int, history: Sequence[RoundRecord]) -> float:
    """The share of round `number`'s prompts that the student answers, after the rounds before."""
    fraction = config.fraction
    if isinstance(fraction, ConstantFraction):
        return fraction.value
    if not isinstance(fraction, AdaptiveFraction):
        progress = (number - 1) / max(1, config.rounds - 1)
        return fraction.start + progress * (fraction.end - fraction.start)
    value = fraction.start
    measured = [record.heldout_before for record in history[:1]]
    measured += [record.heldout for record in history[: number - 1]]
    losses = [scores["reverse_kl"] for scores in measured if scores is not None]
    for before, after in pairwise(losses):
        if after > before + fraction.tolerance:
            value = min(1.0, value + fraction.step)
    return value


def on_policy_count(fraction: float, prompts: int) -> int:
    """How many of a round's prompts, the first ones, the student answers."""
    return round(fraction * prompts)
