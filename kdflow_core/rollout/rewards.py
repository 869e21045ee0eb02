"""What rewards of answers are worth to the policy gradient.

Dimensions: A answers of a round.
"""

from collections.abc import Sequence

import numpy as np


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
