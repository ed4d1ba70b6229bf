"""How far a command in the prompt moved what a decoder chose; knows numbers, and nothing of models or prompts."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from .metrics import Interval, bootstrap_interval

DIRECTIONS: Final = {"low": -1.0, "high": 1.0}
# Temperatures and top-p are float32 of about 1: means that differ by less differ by rounding.
ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class ControlEffect:
    """
    What a command did to one sampling parameter (AutoDeco, Table 4).

    Args:
        mean_baseline (`float`): Mean over prompts of each prompt's mean without the command.
        mean_command (`float`): The same with the command.
        difference (`float`): `mean_command - mean_baseline`.
        interval ([`Interval`]): The difference and its 95 % bootstrap interval over prompts, paired by prompt.
        consistency (`float`): Share of prompts whose mean moved in the commanded direction; one that stayed did not.
        prompts (`int`): How many prompts.
    """

    mean_baseline: float
    mean_command: float
    difference: float
    interval: Interval
    consistency: float
    prompts: int


def control_effect(
    baseline: Sequence[ArrayLike], command: Sequence[ArrayLike], direction: str, *, seed: int = 0
) -> ControlEffect:
    """
    Compares what was chosen for the same prompts without and with a command such as "be as certain as possible".

    Args:
        baseline (sequence of `float` or of arrays `[tokens]`): For each prompt, its mean without the command, or one
            number a token, of which NaN marks the tokens that were not recorded (in a [`DecodingTrace`], those after
            the end of a row).
        command (sequence of `float` or of arrays `[tokens]`): The same with the command, in the same order of prompts.
        direction (`str`): What the command asks for, `"low"` or `"high"` diversity.
        seed (`int`): Seeds the bootstrap.

    Raises:
        `ValueError`: If there are no prompts, their numbers differ, the direction is unknown, or a prompt has no
            recorded number or an infinite one.

    Example:

    ```python
    >>> effect = control_effect([0.8, 0.7, 0.9], [[0.5, 0.7], [0.6, 0.6], [0.9, 0.9]], "low")
    >>> round(effect.difference, 3), round(effect.consistency, 3)
    (-0.1, 0.667)
    ```
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` is {direction!r}; it has to be one of {', '.join(map(repr, DIRECTIONS))}.")
    before, after = _prompt_means("baseline", baseline), _prompt_means("command", command)
    if before.size != after.size:
        raise ValueError(f"`baseline` has {before.size} prompts and `command` {after.size}; they have to pair up.")
    moved = after - before
    interval = bootstrap_interval(moved, seed)
    consistency = (DIRECTIONS[direction] * moved > ROUNDING).mean()
    return ControlEffect(
        float(before.mean()), float(after.mean()), interval.mean, interval, float(consistency), before.size
    )


def _prompt_means(name: str, values: Sequence[ArrayLike]) -> np.ndarray:
    """One mean a prompt, `[prompts]`."""
    if len(values) == 0:
        raise ValueError(f"`{name}` is empty; it has to hold at least one prompt.")
    means = []
    for prompt, value in enumerate(values):
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
        recorded = numbers[~np.isnan(numbers)]
        if numbers.ndim > 1 or recorded.size == 0 or not np.isfinite(recorded).all():
            raise ValueError(
                f"`{name}` of prompt {prompt} is {reprlib.repr(value)}; it has to be a finite number, or one a token "
                "of which at least one is not NaN."
            )
        means.append(recorded.mean())
    return np.array(means)
