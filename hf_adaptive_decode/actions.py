"""Finite action sets and how to choose one from rewards; knows numbers and nothing of models, tasks or policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import SamplingParameterError
from .types import SamplingParameters
from .warping import check_scalars

# Adaptive Decoding, appendix C. A dash or "off" in a table is a key left out, and `do_sample = false` is temperature 0.
# An action's index is its place here, from 0 (Tables 11 and 12 count from 1). Copy a list before changing it.
ACTION_PRESETS: dict[str, list[dict[str, float]]] = {
    # Table 11: sequence level, math (Figure 2).
    "math": [
        {"temperature": 0.75, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.25, "top_k": 10, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
        {"temperature": 1.25, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.25},
    ],
    # Table 12: sequence level, code (Figure 7).
    "code": [
        {"temperature": 1.25, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 1.25, "top_p": 0.95, "min_p": 0.2},
        {"temperature": 1.0, "top_p": 0.95, "min_p": 0.2},
        {"temperature": 1.25, "top_k": 50, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.25, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.75, "top_k": 5, "min_p": 0.1},
    ],
    # Table 13: sequence level, math and code. Its last action, greedy, is not in the pool of Table 10.
    "mixed": [
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 1.25},
        {"temperature": 0.75, "top_k": 10},
        {"temperature": 0.75, "top_k": 10, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 0.0},
    ],
    # Table 14: token level, math. Figure 8 shows these four actions, though its caption cites Table 11.
    "token_math": [{"temperature": 0.0}, {"temperature": 0.5}, {"temperature": 1.0}, {"temperature": 1.25}],
}

# Table 10, in its own order; None is "off".
_POOL_RANGES: dict[str, tuple[float | None, ...]] = {
    "temperature": (0.3, 0.5, 0.75, 1.0, 1.25),
    "top_k": (5, 10, 50, None),
    "top_p": (0.9, 0.95, None),
    "min_p": (0.1, 0.2, None),
}
# What a parameter that is left out amounts to.
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_MAX_REWARD = 1e300  # so that sums over problems stay finite


def candidate_pool(extra: Iterable[dict[str, float]] = ()) -> list[dict[str, float]]:
    """
    The 180 sampling configurations that actions are selected from (Adaptive Decoding, Table 10), and `extra` ones.

    The order is that of nested loops over temperature, top-k, top-p and min-p, each as in the table with "off" last:
    min-p changes fastest. A candidate's index means the same in every run. The dicts are new ones, free to change.

    Args:
        extra (iterable of `dict`, *optional*):
            Configurations to append, but for those that sample like an earlier one: a parameter at its off value
            counts as absent, and at temperature 0 nothing else counts. The table has no greedy decoding, though
            Table 13 selects it: pass `[{"temperature": 0.0}]`.

    Raises:
        [`SamplingParameterError`]: If an extra is no dict, or has an unknown key or a value outside its range.

    Example:

    ```python
    >>> pool = candidate_pool(extra=[{"temperature": 0.0}])
    >>> len(pool), pool[0], pool[-1]
    (181, {'temperature': 0.3, 'top_k': 5, 'top_p': 0.9, 'min_p': 0.1}, {'temperature': 0.0})
    ```
    """
    grid = (dict(zip(_POOL_RANGES, values, strict=True)) for values in itertools.product(*_POOL_RANGES.values()))
    pool = [{name: value for name, value in action.items() if value is not None} for action in grid]
    seen = {_identity(action) for action in pool}
    for index, given in enumerate(extra):
        action = _checked(given, f"extra[{index}]")
        if _identity(action) not in seen:
            seen.add(_identity(action))
            pool.append(action)
    return pool


def coverage(rewards: ArrayLike, chosen: Sequence[int]) -> float:
    """
    F(S): the mean over problems of the best reward that an action of S reaches (Adaptive Decoding, appendix C).

    Equation 3 of section 2.4 sums over problems where appendix C averages; the chosen sets are the same. The mean is
    the accuracy of the best-of-S decoder.

    Args:
        rewards (array of shape `[problems, candidates]`): Reward of each candidate on each problem.
        chosen (sequence of `int`): Column indices of S, at least one; repeating one changes nothing.

    Raises:
        `ValueError`: If `rewards` is no finite, non-empty matrix, or `chosen` is empty or names a missing column.

    Example:

    ```python
    >>> coverage([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], chosen=[0, 1])
    0.75
    ```
    """
    table = _as_table(rewards)
    if not len(chosen):
        raise ValueError("`chosen` is empty; it has to hold at least one column index.")
    for place, column in enumerate(chosen):
        _check_whole(f"chosen[{place}]", column, 0, table.shape[1] - 1)
    return math.fsum(table[:, list(chosen)].max(axis=1).tolist()) / len(table)


def select_actions(rewards: ArrayLike, k: int) -> list[int]:
    """
    Column indices of k actions by greedy coverage: each next one raises F(S) most (Adaptive Decoding, equation 3).

    F is monotone and submodular, so for rewards of at least 0 the picks reach at least 1 − 1/e of the best F of any k.
    Equal gains go to the lowest index. Once nothing left raises F, the highest mean reward comes next, then the lowest
    index. The first j of k picks are those for k = j, and the order of the problems does not matter.

    Args:
        rewards (array of shape `[problems, candidates]`): Each candidate's reward on each problem, all finite.
        k (`int`): How many actions to pick, from 1 to `candidates`.

    Raises:
        `ValueError`: If `rewards` is no finite, non-empty matrix, or k is out of range.

    Example:

    ```python
    >>> # The second column has the second best mean, but solves nothing that the first does not.
    >>> select_actions([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]], k=2)
    [0, 2]
    ```
    """
    table = _as_table(rewards)
    _check_whole("k", k, 1, table.shape[1])
    by_mean = top_by_mean(table, table.shape[1])
    # The empty set's best is below every reward, so the first pick has the highest mean.
    picked = by_mean[:1]
    best = table[:, picked[0]]
    while len(picked) < k:
        rest = [column for column in range(table.shape[1]) if column not in picked]
        covered = _column_sums(np.maximum(table[:, rest], best[:, None]))
        if max(covered) <= math.fsum(best):
            # F is submodular: what raises nothing now will raise nothing later.
            return picked + [column for column in by_mean if column not in picked][: k - len(picked)]
        picked.append(rest[covered.index(max(covered))])
        best = np.maximum(best, table[:, picked[-1]])
    return picked


def top_by_mean(rewards: ArrayLike, k: int) -> list[int]:
    """
    Column indices of the k highest mean rewards Q(s), best first: the baseline of Figure 6. Ties: the lowest index.

    Takes the same arguments as [`select_actions`] and refuses the same.
    """
    table = _as_table(rewards)
    _check_whole("k", k, 1, table.shape[1])
    sums = _column_sums(table)
    return sorted(range(len(sums)), key=lambda column: (-sums[column], column))[:k]


def coverage_curve(rewards: ArrayLike, ks: Iterable[int] | None = None) -> dict[str, list[Any]]:
    """
    Best-of-k reward against the number of actions k, for greedy coverage and for top-k by mean (Figure 6).

    Args:
        rewards (array of shape `[problems, candidates]`): Reward of each candidate on each problem.
        ks (iterable of `int`, *optional*): Numbers of actions; 1 to `candidates` when `None`.

    Returns:
        `dict` of lists of equal length: `"k"`, and F of the k actions by `"greedy_coverage"` and by `"top_by_mean"`.

    Example:

    ```python
    >>> coverage_curve([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]], ks=[1, 2])
    {'k': [1, 2], 'greedy_coverage': [0.75, 1.0], 'top_by_mean': [0.75, 0.75]}
    ```
    """
    table = _as_table(rewards)
    counts = list(range(1, table.shape[1] + 1) if ks is None else ks)
    for place, k in enumerate(counts):
        _check_whole(f"ks[{place}]", k, 1, table.shape[1])
    curve: dict[str, list[Any]] = {"k": [int(k) for k in counts]}
    for name, select in (("greedy_coverage", select_actions), ("top_by_mean", top_by_mean)):
        # Both orders are nested, so the prefixes of the longest one are the shorter ones.
        order = select(table, max(counts, default=1))
        totals = _column_sums(np.maximum.accumulate(table[:, order], axis=1))
        curve[name] = [totals[k - 1] / len(table) for k in counts]
    return curve


def describe(settings: Mapping[str, float]) -> str:
    """
    A sampling configuration in words, to three digits behind the point.

    Example:

    ```python
    >>> describe({"temperature": 0.5, "top_p": 0.9}), describe({"temperature": 0.0})
    ('T=0.5, top-p 0.9', 'greedy')
    ```
    """
    values = {**_OFF, **{name: round(value, 3) for name, value in settings.items()}}
    if values["temperature"] == 0:
        return "greedy"
    used = [name for name in ("top_p", "top_k", "min_p") if values[name] != _OFF[name]]
    return ", ".join([f"T={values['temperature']:g}", *(f"{name.replace('_', '-')} {values[name]:g}" for name in used)])


def _checked(action: object, name: str) -> dict[str, float]:
    """A copy of `action` without the keys that are `None`."""
    if not isinstance(action, dict) or not set(action) <= set(_OFF):
        raise SamplingParameterError(f"`{name}` is {action!r}; it has to be a dict with keys among {tuple(_OFF)}.")
    try:
        check_scalars(SamplingParameters(**cast(dict[str, Any], action)))
    except (SamplingParameterError, TypeError) as error:
        raise SamplingParameterError(f"`{name}`: {error}") from error
    return {key: value for key, value in action.items() if value is not None}


def _identity(action: dict[str, float]) -> tuple[float, ...]:
    """What two actions that sample alike have in common."""
    values = {**_OFF, **action}
    return (0.0,) if values["temperature"] == 0 else tuple(values.values())


def _as_table(rewards: ArrayLike) -> NDArray[np.float64]:
    wanted = f"it has to be [problems, candidates] finite numbers up to ±{_MAX_REWARD:g}, at least one row and column"
    try:
        # A `None`, no reward at all, becomes NaN and is refused below.
        table = np.asarray(rewards, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`rewards` is no table of numbers ({error}); {wanted}.") from error
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"`rewards` has shape {table.shape}; {wanted}.")
    bad = np.argwhere(~(np.abs(table) <= _MAX_REWARD))
    if bad.size:
        row, column = bad[0].tolist()
        raise ValueError(f"`rewards[{row}, {column}]` is {table[row, column]} ({len(bad)} such); {wanted}.")
    return table


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"`{name}` is {value!r}; it has to be a whole number from {low} to {high}.")


def _column_sums(table: NDArray[np.float64]) -> list[float]:
    """Each column's sum, correctly rounded: whatever the order of the rows, equal columns tie exactly."""
    return [math.fsum(column) for column in table.T.tolist()]
