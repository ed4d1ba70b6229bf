"""Credit of each sample of a group for what the group is worth; knows numbers, nothing of models or policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Answers = Sequence[Any] | None  # hashables, or for each group a sequence of them
AGGREGATIONS = ("mean", "pass@B", "best_of", "majority")


def leave_one_out(rewards: ArrayLike) -> Floats:
    """
    A_i = r_i − mean_{j ≠ i} r_j: the credit for the expected reward of one sample.

    Args:
        rewards (array of shape `[groups, n]` or `[n]`): Rewards of n samples of each prompt, n at least 2.

    Raises:
        `ValueError`: If `rewards` has another shape, has fewer than 2 samples or is not finite.

    Returns:
        `np.ndarray` of float64, shaped like `rewards`; exactly 0 where a group's rewards are all equal.
    """
    table = _table(rewards, least=2)
    # Counted from the first sample, so that equal rewards cancel without rounding.
    shifted = table - table[:, :1]
    others = (shifted.sum(axis=1, keepdims=True) - shifted) / (table.shape[1] - 1)
    return np.reshape(shifted - others, np.shape(rewards))


def with_baseline(rewards: ArrayLike, value: float) -> Floats:
    """
    A_i = r_i − value: the credit for the expected reward of one sample, against a baseline of one's own.

    Unbiased if `value` does not depend on the samples. The mean of N rewards, r_i's too, scales it by 1 − 1/N.

    Args:
        rewards (array of shape `[groups, n]` or `[n]`): Rewards of n samples of each prompt.
        value (`float`): The baseline; 0 for none.

    Raises:
        `ValueError`: If `rewards` has another shape, or either is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"`value` is {value}; it has to be finite. Pass 0 for no baseline.")
    return np.reshape(_table(rewards) - value, np.shape(rewards))


def best_of_k_credit(rewards: ArrayLike, k: ArrayLike) -> Floats:
    """
    A_i = k (g_i(r_i) − mean_{j ≠ i} g_i(r_j)), g_i(x) = mean_S max(x − max_S r, 0): the credit for the best of k.

    S runs over all (k − 1)-subsets of the other samples, and g_i(x) = x for k = 1. What is worth something is to be
    better than k − 1 others. With rewards of 0 and 1 the objective is pass@k.

    Args:
        rewards (array of shape `[groups, n]` or `[n]`): Rewards of n samples of each prompt, n at least 2.
        k (`int` or `int` array of shape `[groups]`): Samples that one may use, from 1 to n.

    Raises:
        `ValueError`: If `rewards` has another shape, has fewer than 2 samples or is not finite, or k is out of range.

    Returns:
        `np.ndarray` of float64, shaped like `rewards`; exactly 0 where a group's rewards are all equal.

    Example:

    ```python
    >>> best_of_k_credit([1.0, 0.0, 0.0], k=2)
    array([ 2. , -0.5, -0.5])
    ```
    """
    table = _table(rewards, least=2)
    n, ks = table.shape[1], _budgets(k, *table.shape)
    order = table.argsort(axis=1)
    gaps = np.diff(np.take_along_axis(table, order, axis=1), axis=1)
    # In ascending order, g_i(r_i) − g_i(r_j) is the sum of the gaps between the two, each times the chance that S lies
    # below the gap. Below gap q are q + 1 samples, of which i itself cannot be in S. Summing over j counts a gap once
    # for each j beyond it.
    below = np.arange(1, n)
    chance = _chance_within(n - 1, ks - 1)
    rise, fall = gaps * chance[:, 1:] * below, gaps * chance[:, :-1] * (n - below)
    sums = np.zeros_like(table)
    sums[:, 1:] += rise.cumsum(axis=1)
    sums[:, :-1] -= fall[:, ::-1].cumsum(axis=1)[:, ::-1]
    result = np.empty_like(table)
    np.put_along_axis(result, order, sums * ks[:, None] / (n - 1), axis=1)
    return result.reshape(np.shape(rewards))


def best_of_k_by_score_credit(rewards: ArrayLike, scores: ArrayLike, k: ArrayLike) -> Floats:
    """
    A_i = k (mean_S v(S ∪ i) − b_i), v the reward of the best scored of k: the credit for choosing by a score.

    Samples that tie for the highest score share equally: v is their mean reward. S and b_i are those of
    [`subset_credit`]; here all subsets count, in closed form. It is computed as A_i = n (V − V_i), V the mean of v
    over the k-subsets of all n samples and V_i without sample i, over the min(k, n − 1)-subsets of the others.

    Args:
        rewards, k: As for [`best_of_k_credit`], which refuses the same.
        scores (array shaped like `rewards`): What the best is chosen by; may be infinite.

    Raises:
        `ValueError`: If `scores` does not match or has a NaN.

    Returns:
        `np.ndarray` of float64, shaped like `rewards`.
    """
    table = _table(rewards, least=2)
    n, ks = table.shape[1], _budgets(k, *table.shape)
    lower, tied = _comparisons(scores, np.shape(rewards))
    below, ties = lower.sum(axis=1), tied.sum(axis=1)
    whole = _chance_on_top(below, ties, _chance_within(n, ks))
    # The same of each sample j in a group without sample i: [groups, i, j].
    within = _chance_within(n - 1, np.minimum(ks, n - 1))
    rest = _chance_on_top(below[:, None] - lower, ties[:, None] - tied, within) * ~np.eye(n, dtype=bool)
    return np.reshape(n * np.einsum("gij,gj->gi", whole[:, None] - rest, table), np.shape(rewards))


def subset_credit(n: int, k: int, value: Callable[[Ints], Floats], limit: int = 2000, seed: int = 0) -> Floats:
    """
    A_i = k (mean_S v(S ∪ i) − b_i): the credit for any value v of a set of k samples.

    S runs over the (k − 1)-subsets of the other samples; b_i is the mean of v over the min(k, n − 1)-subsets of them.
    Where there are more than `limit` k-subsets, `limit` random ones stand for all. The credit stays unbiased: their
    choice does not depend on the samples' values, each sample is in one, and b_i still knows the other samples only.

    Args:
        n (`int`): Samples of the prompt, at least 2.
        k (`int`): Samples that one may use, from 1 to n.
        value (callable): Takes index sets as an int64 array `[sets, size]`, and returns v of each, `[sets]`.
        limit (`int`): Sets to look at, at least n / k; with as many or fewer k-subsets, all of them.
        seed (`int`): Seeds the choice of sets.

    Raises:
        `ValueError`: If n, k or `limit` is out of range.

    Returns:
        `np.ndarray` of float64, of shape `[n]`.
    """
    if n < 2:
        raise ValueError(f"`n` is {n}; it has to be at least 2, as a sample's baseline is the others.")
    sets = _subsets(n, int(_budgets(k, 1, n)[0]), limit, seed)
    inside, values = _membership(sets, n), value(sets)
    mean = values @ inside / inside.sum(axis=0)
    if k == n:
        return np.asarray(n * (mean - value(_subsets(n, n - 1, n, 0)[::-1])))
    # A sample that all of the random sets hold has a baseline of 0.
    without = 1 - inside
    return np.asarray(k * (mean - values @ without / np.maximum(without.sum(axis=0), 1)))


def majority_credit(
    rewards: ArrayLike, answers: Sequence[Any], k: ArrayLike, limit: int = 2000, seed: int = 0
) -> Floats:
    """
    A_i = k (mean_S v(S ∪ i) − b_i), v the mean reward of the most common answer of k: the credit for a vote.

    Answers that are equally common share equally: v is the average of their holders' mean rewards. `None` is no
    answer, and loses to every other; if all k are `None`, v is their mean reward. S and b_i are those of
    [`subset_credit`].

    Args:
        rewards, k: As for [`best_of_k_credit`], which refuses the same.
        answers (sequence of hashables, nested like `rewards`): Each sample's answer, `None` for none.
        limit, seed: As for [`subset_credit`], which refuses the same.

    Raises:
        `ValueError`: If `answers` does not match or is not hashable.

    Returns:
        `np.ndarray` of float64, shaped like `rewards`.
    """
    table = _table(rewards, least=2)
    ks = _budgets(k, *table.shape).tolist()
    votes = _votes(table, answers, flat=np.ndim(rewards) == 1)
    rows = [subset_credit(table.shape[1], k, vote, limit, seed) for k, vote in zip(ks, votes, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(np.shape(rewards))


def credit(
    rewards: ArrayLike, parallel: ArrayLike, aggregation: str, scores: ArrayLike | None = None, answers: Answers = None
) -> Floats:
    """
    A_i with E[1/n Σ_i ∇ log π(X_i) A_i] = ∇ E[v(X_1, …, X_B)]: the credit of sample i for what B samples are worth.

    Args:
        rewards (array of shape `[groups, n]`): Rewards of n samples of each prompt, n at least 2.
        parallel (`int` array of shape `[groups]`): B, the samples that one may use, from 1 to n.
        aggregation (`str`):
            What v is: `"mean"`, the reward of one sample whatever B is; `"pass@B"`, the highest reward; `"best_of"`,
            the reward of the highest score; `"majority"`, the reward of the most common answer.
        scores (array shaped like `rewards`, *optional*): For `"best_of"`.
        answers (sequence of hashables, nested like `rewards`, *optional*): For `"majority"`; `None` is no answer.

    Raises:
        `ValueError`: If `aggregation` is unknown, what it needs is missing, or a value is out of range.

    Returns:
        `np.ndarray` of float64, shaped like `rewards`.
    """
    _check_aggregation(aggregation, scores, answers)
    if aggregation == "mean":
        return leave_one_out(rewards)
    if aggregation == "pass@B":
        return best_of_k_credit(rewards, parallel)
    if aggregation == "best_of":
        return best_of_k_by_score_credit(rewards, cast(ArrayLike, scores), parallel)
    return majority_credit(rewards, cast(Sequence[Any], answers), parallel)


def group_value(
    rewards: ArrayLike, parallel: ArrayLike, aggregation: str, scores: ArrayLike | None = None, answers: Answers = None
) -> Floats:
    """
    mean_S v(S) over the B-subsets S of a group: the unbiased estimate of E[v(X_1, …, X_B)].

    For `"pass@B"` and rewards of 0 and 1 it is [`~evaluation.metrics.pass_at_k`]. Takes the same arguments as
    [`credit`] and refuses the same, but a single sample will do.

    Returns:
        `np.ndarray` of float64, of shape `[groups]`.
    """
    _check_aggregation(aggregation, scores, answers)
    table = _table(rewards)
    n = table.shape[1]
    if aggregation == "mean":
        return np.asarray(table.mean(axis=1))
    ks = _budgets(parallel, *table.shape)
    if aggregation == "majority":
        votes = _votes(table, cast(Sequence[Any], answers), flat=np.ndim(rewards) == 1)
        means = [vote(_subsets(n, k, 2000, 0)).mean() for k, vote in zip(ks.tolist(), votes, strict=True)]
        return np.array(means, dtype=np.float64)
    # The best of a set is the best scored, when the score is the reward.
    level = rewards if aggregation == "pass@B" else cast(ArrayLike, scores)
    lower, tied = _comparisons(level, np.shape(rewards))
    on_top = _chance_on_top(lower.sum(axis=1), tied.sum(axis=1), _chance_within(n, ks))
    return np.asarray((on_top * table).sum(axis=1))


def _comparisons(scores: ArrayLike, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether sample i is below sample j, and whether they tie: `[groups, i, j]`."""
    level = np.asarray(scores, dtype=np.float64)
    if level.shape != shape or np.isnan(level).any():
        found = f"has shape {level.shape}" + " and a NaN" * bool(np.isnan(level).any())
        raise ValueError(f"`scores` {found}; it has to be one number for each reward, {shape}, and no NaN.")
    level = level.reshape(-1, shape[-1])
    return level[:, :, None] < level[:, None, :], level[:, :, None] == level[:, None, :]


def _chance_on_top(below: Ints, ties: Ints, within: Floats) -> Floats:
    """The chance that a sample with `below` lower ones, one of `ties` equals, is chosen from a random subset."""
    group = np.arange(len(below)).reshape(-1, *[1] * (below.ndim - 1))
    return np.asarray((within[group, below + ties] - within[group, below]) / np.maximum(ties, 1))


def _chance_within(n: int, ks: Ints) -> Floats:
    """C(c, k) / C(n, k) for c = 0, …, n: the chance that a random k-subset lies within c given samples."""
    sizes, groups = np.unique(ks, return_inverse=True)
    # Python's integers are exact and their quotient is rounded once.
    rows = [[math.comb(c, k) / math.comb(n, k) for c in range(n + 1)] for k in sizes.tolist()]
    return np.array(rows, dtype=np.float64).reshape(-1, n + 1)[groups]


@lru_cache(maxsize=32)
def _subsets(n: int, k: int, limit: int, seed: int) -> Ints:
    """All k-subsets of n, or `limit` random ones that together hold every sample: `[sets, k]`."""
    blocks = math.ceil(n / k)
    if limit < blocks:
        raise ValueError(f"`limit` is {limit}; it has to be at least {blocks} for sets of {k} to hold all {n} samples.")
    if math.comb(n, k) <= limit:
        sets = np.array(list(itertools.combinations(range(n), k)), dtype=np.int64)
    else:
        # Each shuffle is cut into sets, the last one filled up from the start: each is a uniform k-subset, and none
        # of the samples is left out.
        orders = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (math.ceil(limit / blocks), 1)), axis=1)
        sets = np.concatenate([orders, orders[:, : blocks * k - n]], axis=1).reshape(-1, k)[:limit]
    sets.flags.writeable = False
    return sets


def _membership(sets: Ints, n: int) -> Floats:
    """1 where a set holds a sample, else 0: `[sets, n]`."""
    inside = np.zeros((len(sets), n))
    np.put_along_axis(inside, sets, 1.0, axis=1)
    return inside


def _votes(table: Floats, answers: Sequence[Any], flat: bool) -> list[Callable[[Ints], Floats]]:
    """For each group, what gives index sets the reward of their most common answer."""
    rows = [answers] if flat else answers
    lengths = [len(row) if hasattr(row, "__len__") else 1 for row in rows]
    if lengths != [table.shape[1]] * len(table):
        raise ValueError(f"`answers` has {lengths} answers; it has to have {table.shape[1]} for each of {len(table)}.")
    return [partial(_vote, rewards, _holds(row)) for rewards, row in zip(table, rows, strict=True)]


def _holds(answers: Sequence[Hashable]) -> Floats:
    """1 where a sample holds an answer, else 0: `[n, answers]`. The first answer is `None`."""
    columns: dict[Hashable, int] = {None: 0}
    try:
        held = [columns.setdefault(answer, len(columns)) for answer in answers]
    except TypeError as error:
        raise ValueError(f"`answers` holds {list(answers)!r} ({error}); an answer has to be hashable.") from error
    return np.eye(len(columns))[held]


def _vote(rewards: Floats, holds: Floats, sets: Ints) -> Floats:
    inside = _membership(sets, len(rewards))
    counts = inside @ holds
    means = inside @ (holds * rewards[:, None]) / np.maximum(counts, 1)
    # A whole set of `None` is not worth one vote, so that it only wins where nothing else stands.
    counts[:, 0] /= len(rewards) + 1
    top = counts == counts.max(axis=1, keepdims=True)
    return np.asarray(np.average(means, axis=1, weights=top))


def _check_aggregation(aggregation: str, scores: object, answers: object) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` is {aggregation!r}; it has to be one of {AGGREGATIONS}.")
    for needs, name, given in (("best_of", "scores", scores), ("majority", "answers", answers)):
        if aggregation == needs and given is None:
            raise ValueError(f"`{name}` is None; aggregation {needs!r} needs them: pass one for each reward.")


def _table(rewards: ArrayLike, least: int = 1) -> Floats:
    table = np.asarray(rewards, dtype=np.float64)
    if table.ndim not in (1, 2) or table.shape[-1] < least:
        raise ValueError(f"`rewards` has shape {table.shape}; it has to be [groups, n] or [n] with n >= {least}.")
    if len(bad := np.argwhere(~np.isfinite(table)).tolist()):
        raise ValueError(f"`rewards{bad[0]}` is {table[tuple(bad[0])]}; it has to be finite. Drop such groups before.")
    return table.reshape(-1, table.shape[-1])


def _budgets(k: ArrayLike, groups: int, n: int) -> Ints:
    ks = np.asarray(k)
    if ks.dtype.kind not in "iu" or ks.shape not in ((), (groups,)) or ((ks < 1) | (ks > n)).any():
        wanted = f"whole, from 1 to n = {n}, and one for all or one for each of {groups} groups"
        raise ValueError(f"`k` is {ks.tolist()!r}; it has to be {wanted}. For a higher k, draw more samples.")
    return np.broadcast_to(ks.astype(np.int64), groups)
