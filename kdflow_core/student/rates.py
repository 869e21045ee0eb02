"""The learning rate of a step: a pure function of it, so that a resumed run goes on."""

import math

from configs.schema.student import StudentConfig

SCALE = 10_000  # steps, in which an inverse root without a rise comes to 1 / sqrt(2)


def rate_factor(config: StudentConfig, *, step: int, num_steps: int) -> float:
    """What every rate is multiplied by in a step (counted from 0): it rises linearly, then follows
    the schedule down to `min_lr_ratio` in the last step, or with `inverse_sqrt` to no less.
    """
    warmup = config.rising_steps(num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_schedule == "inverse_sqrt":
        scale = warmup or SCALE
        return max(config.min_lr_ratio, math.sqrt(scale / (scale + step - warmup)))
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * _height(config, progress)


def _height(config: StudentConfig, progress: float) -> float:
    """From 1 down to 0, as `progress` goes from 0 to 1."""
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine_with_restarts":
        cycle = config.lr_cycles * progress
        return 0.5 * (1 + math.cos(math.pi * (cycle % 1.0 if progress < 1 else 1.0)))
    if config.lr_schedule == "polynomial":
        return math.pow(1 - progress, config.lr_power)
    if config.lr_schedule == "linear":
        return 1 - progress
    if config.lr_schedule == "wsd":
        return min(1.0, (1 - progress) / config.decay_fraction)
    return 1.0
