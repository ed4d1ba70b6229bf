"""pass@k and intervals over problems; knows numbers and nothing of models or tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Any:
    """
    1 − C(n − c, k) / C(n, k): the unbiased estimate of solving a problem with k samples.

    Args:
        n (`int` or array): Samples drawn of each problem.
        c (`int` or array): How many of them are right.
        k (`int`): Samples one may use.

    Returns:
        `float`, or an array of the broadcast shape.

    Raises:
        `ValueError`: If k is above n or below 1, or c is not within 0 and n.

    Example:

    ```python
    >>> pass_at_k(4, 1, 2)
    0.5
    ```
    """
    total, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    for name, values in (("n", total), ("c", right), ("k", np.asarray(k))):
        if values.dtype.kind not in "iu":
            raise ValueError(f"`{name}` is {values.tolist()!r}; it has to be whole numbers.")
    if k < 1 or (total < k).any():
        raise ValueError(f"`k` is {k}; it has to be between 1 and n = {int(total.min())}, the samples drawn.")
    if (right < 0).any() or (right > total).any():
        raise ValueError(f"`c` is {right.tolist()!r}; it has to be between 0 and n = {total.tolist()!r}.")
    # Π over the k draws of the chance that each is wrong; the product is 0 as soon as the wrong ones run out.
    draws = np.arange(k)
    wrong = np.clip(total[..., None] - right[..., None] - draws, 0, None) / (total[..., None] - draws)
    result = 1.0 - wrong.prod(axis=-1)
    return float(result) if result.ndim == 0 else result


@dataclass(frozen=True)
class Interval:
    """A mean over problems and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95) -> Interval:
    """
    Mean and percentile interval (2.5 % to 97.5 % by default) under resampling of problems.

    Args:
        values (array of shape `[problems]`): One number a problem; for a paired comparison, the differences.
        seed (`int`): Seeds the resampling.
        resamples (`int`): How often to resample.
        confidence (`float`): What the interval covers; as much is left out on either side.

    Raises:
        `ValueError`: If there are no values, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"`values` has shape {numbers.shape}; it has to be one finite number a problem.")
    return bootstrap_intervals(numbers[None], seed, resamples, confidence)[0]


def bootstrap_intervals(
    rows: ArrayLike, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> list[Interval]:
    """As [`bootstrap_interval`], of each row of `[rows, problems]`, all from the same resamples."""
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"`values` has shape {table.shape}; it has to be one finite number a problem.")
    means = _counts(table.shape[1], seed, resamples) @ table.T / table.shape[1]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [Interval(float(row.mean()), float(a), float(b)) for row, a, b in zip(table, low, high, strict=True)]


@lru_cache(maxsize=1)
def _counts(problems: int, seed: int, resamples: int) -> np.ndarray:
    """How often each problem is drawn, `[resamples, problems]`; an evaluation asks for the same again and again."""
    drawn = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), resamples)
    return drawn.astype(np.float32)


def sign_flip_p(differences: ArrayLike, seed: int = 0, resamples: int = 10_000) -> float:
    """
    One-sided p-value of paired differences being above 0: how often a mean as high comes of flipping signs at random.

    Exact (up to the resampling) wherever differences are as likely to be up as down, however few of them are not 0;
    there a bootstrap interval is too narrow.

    Args:
        differences (array of shape `[problems]`): One number a problem.
        seed (`int`): Seeds the flips.
        resamples (`int`): How many.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    moved = numbers[numbers != 0]
    flips = np.random.default_rng(seed).integers(0, 2, (resamples, len(moved)), dtype=np.int8) * 2 - 1
    # The sum may differ from itself in its last bits when added up in another order.
    as_high = flips @ moved >= moved.sum() - 1e-9
    return float((1 + as_high.sum()) / (1 + resamples))
