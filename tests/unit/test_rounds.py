"""What a round is made of: its prompts, the student's share of them, rewards, memory."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from configs.load import load_run
from configs.schema.on_policy import AdaptiveFraction, Fraction, LinearFraction, OnPolicyConfig
from kdflow_core.models.structure import decoder_layers
from kdflow_core.rollout.prompts import round_prompts, share_answers
from kdflow_core.rollout.rewards import advantages
from tasks.forecast.memory import PHASES, memory_lines, memory_phases, num_parameters
from tasks.rounds.round_record import RoundRecord, next_fraction
from tasks.stages.identity import StageSpec
from tasks.stages.planning import plan_stages
from tests.small_training import NARROW

SOURCE = np.array([0] * 20 + [1] * 5)


def prompts(number: int, weights: dict[str, float] | None, seed: int = 0) -> list[int]:
    return round_prompts(
        source=SOURCE, names=["a", "b"], weights=weights, count=10, number=number, seed=seed
    )


def test_without_weights_all_prompts_come_before_any_comes_again() -> None:
    drawn = [i for number in range(1, 6) for i in prompts(number, None)]
    assert sorted(drawn[:25]) == sorted(drawn[25:]) == list(range(25))
    assert drawn[:25] != drawn[25:] != list(range(25))
    assert prompts(3, None) == prompts(3, None) != prompts(3, None, seed=1)


def test_weights_say_how_often_a_source_comes() -> None:
    drawn = [i for number in range(1, 101) for i in prompts(number, {"a": 1.0, "b": 3.0})]
    share = np.mean(np.array(drawn) >= 20)
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 1000)
    of_b = Counter(i for i in drawn if i >= 20)
    assert max(of_b.values()) - min(of_b.values()) <= 1
    assert all(i >= 20 for i in prompts(1, {"b": 1.0}))


@pytest.mark.parametrize(("together", "engines"), [(1, 1), (1, 3), (4, 3), (4, 8), (7, 2)])
def test_engines_share_answers_by_what_they_cost(together: int, engines: int) -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(1, 1000, 41).tolist()
    shares = share_answers(costs, together=together, engines=engines)
    assert len(shares) == engines
    assert sorted(place for share in shares for place in share) == list(range(41))
    owner = {place: rank for rank, share in enumerate(shares) for place in share}
    assert all(share == sorted(share) for share in shares)
    assert all(owner[place] == owner[place // together * together] for place in range(41))
    loads = [sum(costs[place] for place in share) for share in shares]
    # As scheduling the longest first is bound (Graham 1969): a unit's cost apart at most.
    dearest = max(sum(costs[i : i + together]) for i in range(0, 41, together))
    assert max(loads) - min(loads) <= dearest


def record(number: int, before: float | None, after: float) -> RoundRecord:
    return RoundRecord(
        number=number,
        fraction=0.0,
        version=0,
        staleness=0,
        answers=1,
        answer_tokens=1,
        mean_length=1.0,
        longest=1,
        finish_reasons={"stop": 1},
        reward_mean=None,
        last_step=number,
        loss=0.0,
        kd=0.0,
        log_prob_difference=None,
        heldout_before=None if before is None else {"reverse_kl": before},
        heldout={"reverse_kl": after},
        seconds={},
    )


def on_policy(fraction: Fraction) -> OnPolicyConfig:
    return OnPolicyConfig(rounds=5, prompts_per_round=4, fraction=fraction)


def test_a_linear_share() -> None:
    config = on_policy(LinearFraction(start=0.2, end=1.0))
    shares = [next_fraction(config, number, []) for number in range(1, 6)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_an_adaptive_share_grows_when_the_heldout_loss_does() -> None:
    config = on_policy(AdaptiveFraction(start=0.1, step=0.5, tolerance=0.05))
    history = [record(1, 2.0, 2.1), record(2, None, 1.9), record(3, None, 1.94)]
    history.append(record(4, None, 2.5))
    shares = [next_fraction(config, number, history[: number - 1]) for number in range(1, 6)]
    # Above the round before in the first and fourth, within the tolerance in the third; never > 1.
    assert shares == pytest.approx([0.1, 0.6, 0.6, 0.6, 1.0])


def test_advantages_go_by_the_answers_to_one_prompt() -> None:
    worth = advantages([1.0, 3.0, 5.0, 5.0, 7.0], [4, 4, 9, 9, 4], normalize=True)
    deviation = math.sqrt(((1 - 11 / 3) ** 2 + (3 - 11 / 3) ** 2 + (7 - 11 / 3) ** 2) / 3)
    expected = [(r - 11 / 3) / deviation for r in (1.0, 3.0)]
    assert worth == pytest.approx([*expected, 0.0, 0.0, (7 - 11 / 3) / deviation])
    assert advantages([1.0, 2.0, 6.0], [0, 1, 2], normalize=False) == [-2.0, -1.0, 3.0]


def planned(
    make_recipe: Callable[..., Path], on_policy: dict[str, Any], **more: Any
) -> tuple[dict[str, dict[str, int]], str]:
    """The parts of each phase, and what is said of the peak."""
    section = {"rounds": 1, "prompts_per_round": 4} | on_policy
    recipe = str(make_recipe(max_steps=None))
    run = load_run(recipe, {"mode": "onpolicy", "on_policy": section} | more)
    phases = memory_phases(StageSpec(identity=plan_stages(run)["train"], run=run, inputs={}))
    return {phase.name: dict(phase.parts) for phase in phases}, memory_lines(phases)[-1]


def test_the_memory_forecast_of_parts_that_sleep(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """Weights in float32 with AdamW's two moments, gradients while training; who sleeps is away."""
    section = {"rollout": {"type": "sglang", "sleep": True, "bucket_mb": 1}, "steps_per_round": 5}
    more = {"student.sleep": True, "teacher.sleep": True, "teacher.forward_batches": 2}
    phases, peak = planned(make_recipe, section, **more)
    count = num_parameters(student_folder)
    assert phases["roll out"] == {"engine": 2 * count}
    assert phases["build the student"] == {"student": 4 * count, "moments": 8 * count}
    assert phases["swap weights"] == {
        "student": 4 * count,
        "engine": 2 * count,
        "buckets": 2_000_000,
    }
    assert set(phases["score"]) == {"teacher", "states"}
    training = phases["train"]
    assert training.pop("states") == 2 * 8 * 128 * 48 * 4  # two steps' texts of the full length
    assert training == {
        "student": 4 * count,
        "moments": 8 * count,
        "gradients": 4 * count,
        "logits": 1_000_000,
    }
    assert peak.startswith("peak memory of a device: 0.00 GB, to swap weights; activations and the")


def test_the_memory_forecast_of_muon(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """It keeps one moment of a matrix in a decoder layer."""
    muon = {"student.optimizer": {"type": "muon"}}
    phases, _ = planned(make_recipe, {"rollout": {"type": "transformers"}}, **muon)
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    inner = sum(p.numel() for p in decoder_layers(model).parameters() if p.ndim == 2)
    expected = 8 * num_parameters(student_folder) - 4 * inner
    assert phases["train"]["moments"] == expected


def test_the_memory_forecast_of_narrow_weights_and_moments(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    fields = {f"student.{name}": value for name, value in NARROW.items()}
    phases, _ = planned(make_recipe, {"rollout": {"type": "transformers"}}, **fields)
    count = num_parameters(student_folder)
    assert phases["train"]["student"] == 2 * count
    assert phases["train"]["moments"] == 2 * 2 * count
    assert phases["train"]["gradients"] == 2 * count


def test_the_memory_forecast_of_an_engine_whose_cache_is_known(
    make_recipe: Callable[..., Path],
) -> None:
    """Keys and values of two layers, two heads and eight dimensions."""
    cached = 2 * 2 * 2 * 8 * 2  # bytes of a token in bfloat16
    phases, peak = planned(make_recipe, {"rollout": {"type": "sglang", "cache_tokens": 1000}})
    assert all(phases[name]["cache"] == 1000 * cached for name in PHASES)
    assert "activations come on top" in peak
    phases, _ = planned(make_recipe, {"rollout": {"type": "transformers", "prompts_per_batch": 5}})
    assert phases["roll out"]["cache"] == 5 * 128 * cached
    assert "cache" not in phases["train"]
    assert "engine" in phases["train"]


def test_the_memory_forecast_of_what_an_algorithm_has_of_its_own(
    make_recipe: Callable[..., Path], student_folder: Path
) -> None:
    """Projectors between the widths 32 and 48, with their moments; an average of the student."""
    section = {"rollout": {"type": "transformers"}}
    phases, _ = planned(make_recipe, section, algorithm={"type": "dual_space"})
    assert phases["train"]["algorithm"] == 2 * 32 * 48 * 12
    average = {
        "algorithm": {"type": "self_distillation", "update": "ema"},
        "teacher.model.path": str(student_folder),
    }
    phases, _ = planned(make_recipe, section, **average)
    assert phases["train"]["algorithm"] == 4 * num_parameters(student_folder)
    phases, _ = planned(make_recipe, section)
    assert "algorithm" not in phases["train"]
