"""Rewards of answers by a user's function, and what they are worth to the policy gradient.

Dimensions: A answers of a round.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdflow_core.errors import DataError

RewardFunction = Callable[[str, str, str | None], Any]


def load_reward(path: Path, name: str) -> RewardFunction:
    """The function `name` of a Python file. Raises DataError when it is not there."""
    spec = importlib.util.spec_from_file_location("kdflow_reward", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"on_policy.reward.function: there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"on_policy.reward.function: {path} has no function '{name}'")
    checked: RewardFunction = function
    return checked


def reward_of(function: RewardFunction, prompt: str, answer: str, label: str | None) -> float:
    """One answer's reward. Raises DataError when the function gives no finite number."""
    value = function(prompt, answer, label)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"on_policy.reward.function gave {value!r} for the answer {answer[:80]!r}; it must "
            "give a finite number"
        )
    return float(value)


def advantages(rewards: Sequence[float], prompts: Sequence[int], *, normalize: bool) -> list[float]:
    """The reward of each answer minus the mean of its group, [A]: the answers to one prompt, or,
    where no prompt has two, all of them. With `normalize` over the group's standard deviation.

    GRPO (arXiv 2402.03300, section 4.1.2). A group of equals has advantages of 0.
    """
    reward_A, group_A = np.array(rewards, float), np.array(prompts)
    if len(np.unique(group_A)) == len(group_A):
        group_A = np.zeros(len(group_A), int)
    result_A = np.zeros(len(reward_A))
    for group in np.unique(group_A):
        mine = group_A == group
        centered = reward_A[mine] - reward_A[mine].mean()
        deviation = float(reward_A[mine].std())
        result_A[mine] = centered / deviation if normalize and deviation > 0 else centered
    return [float(a) for a in result_A]
