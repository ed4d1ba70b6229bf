"""pass@k and intervals over problems; knows numbers and nothing of models or tasks."""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 10_000) -> Interval:
    """
    Mean and percentile interval (2.5 % to 97.5 %) under resampling of problems.

    Args:
        values (array of shape `[problems]`): One number a problem; for a paired comparison, the differences.
        seed (`int`): Seeds the resampling.
        resamples (`int`): How often to resample.

    Raises:
        `ValueError`: If there are no values, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"`values` has shape {numbers.shape}; it has to be one finite number a problem.")
    # A resample is how often each problem is drawn; as counts, all resamples are one matrix product.
    counts = np.random.default_rng(seed).multinomial(numbers.size, np.full(numbers.size, 1 / numbers.size), resamples)
    means = counts @ numbers / numbers.size
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high))
