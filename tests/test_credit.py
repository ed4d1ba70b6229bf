"""The credit of a sample: against plain enumeration, and against the exact gradient of what a group is worth."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode.evaluation.metrics import pass_at_k
from hf_adaptive_decode.training.credit import (
    AGGREGATIONS,
    best_of_k_by_score_credit,
    best_of_k_credit,
    credit,
    group_value,
    leave_one_out,
    majority_credit,
    subset_credit,
    with_baseline,
)

# Few distinct values, so that rewards and scores tie often.
REWARDS = st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0])
SCORES = st.sampled_from([-math.inf, -1.0, 0.0, 2.0])
ANSWERS = st.sampled_from([None, "7", "8", (1, 2)])
GROUPS = st.lists(st.tuples(REWARDS, SCORES, ANSWERS), min_size=2, max_size=6)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def value_of(aggregation, samples):
    """v of a few (reward, score, answer), as plainly as it can be said."""
    rewards = [reward for reward, _, _ in samples]
    if aggregation == "mean":
        return mean(rewards)
    if aggregation == "pass@B":
        return max(rewards)
    if aggregation == "best_of":
        best = max(score for _, score, _ in samples)
        return mean(reward for reward, score, _ in samples if score == best)
    answers = [answer for _, _, answer in samples if answer is not None]
    if not answers:
        return mean(rewards)
    most = max(answers.count(answer) for answer in answers)
    common = {answer for answer in answers if answers.count(answer) == most}
    return mean(mean(reward for reward, _, answer in samples if answer == one) for one in common)


def enumerated_credit(aggregation, samples, k):
    """k (mean_S v(S + i) − mean_S' v(S')) over subsets of the others, S of k − 1 and S' of min(k, n − 1)."""
    result = []
    for i, sample in enumerate(samples):
        others = samples[:i] + samples[i + 1 :]
        with_it = mean(value_of(aggregation, [*s, sample]) for s in itertools.combinations(others, k - 1))
        without = mean(value_of(aggregation, s) for s in itertools.combinations(others, min(k, len(others))))
        result.append(k * (with_it - without))
    return result


def columns(samples):
    rewards, scores, answers = zip(*samples, strict=True)
    return np.array(rewards), np.array(scores), list(answers)


def budget(data, samples):
    return data.draw(st.integers(1, len(samples)), label="k")


@given(st.lists(st.lists(REWARDS, min_size=4, max_size=4), min_size=1, max_size=3))
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(rewards):
    wanted = [[r - mean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)] for row in rewards]
    np.testing.assert_allclose(leave_one_out(rewards), wanted, atol=1e-12)


@given(GROUPS, st.data())
def test_best_of_k_matches_enumeration(samples, data):
    k = budget(data, samples)
    rewards = columns(samples)[0].tolist()
    wanted = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]

        def gain(x, others=others):
            if k == 1:
                return x
            return mean(max(x - max(subset), 0.0) for subset in itertools.combinations(others, k - 1))

        wanted.append(k * (gain(reward) - mean(gain(other) for other in others)))
    np.testing.assert_allclose(best_of_k_credit(rewards, k), wanted, atol=1e-12)


@given(GROUPS, st.data())
def test_best_of_k_by_score_matches_enumeration(samples, data):
    k = budget(data, samples)
    rewards, scores, _ = columns(samples)
    wanted = enumerated_credit("best_of", samples, k)
    np.testing.assert_allclose(best_of_k_by_score_credit(rewards, scores, k), wanted, atol=1e-12)


@given(GROUPS, st.data())
def test_majority_matches_enumeration(samples, data):
    k = budget(data, samples)
    rewards, _, answers = columns(samples)
    wanted = enumerated_credit("majority", samples, k)
    np.testing.assert_allclose(majority_credit(rewards, answers, k), wanted, atol=1e-12)


@given(GROUPS, st.sampled_from(AGGREGATIONS), st.data())
def test_any_value_can_be_credited_by_subsets(samples, aggregation, data):
    k = budget(data, samples)

    def value(sets):
        return np.array([value_of(aggregation, [samples[i] for i in chosen]) for chosen in sets.tolist()])

    wanted = enumerated_credit(aggregation, samples, k)
    np.testing.assert_allclose(subset_credit(len(samples), k, value), wanted, atol=1e-12)


@given(GROUPS, st.sampled_from(AGGREGATIONS), st.data())
def test_group_value_matches_enumeration(samples, aggregation, data):
    k = budget(data, samples)
    rewards, scores, answers = columns(samples)
    wanted = mean(value_of(aggregation, chosen) for chosen in itertools.combinations(samples, k))
    found = group_value(rewards[None], np.array([k]), aggregation, scores[None], [answers])
    np.testing.assert_allclose(found, [wanted], atol=1e-12)


@pytest.mark.parametrize("n", [2, 5, 9, 64])
def test_zero_and_one_rewards_give_the_pass_at_k_formulas(n):
    rng = np.random.default_rng(n)
    for k, right in itertools.product({1, 2, n // 2 or 1, n - 1, n}, {0, 1, n // 3, n - 1, n}):
        rewards = rng.permutation((np.arange(n) < right).astype(float))
        wanted = []
        for reward in rewards:
            c = right - int(reward)
            weight = math.comb(n - 1 - c, k - 1) / math.comb(n - 1, k - 1)
            wanted.append(k * weight * (reward - c / (n - 1)))
        np.testing.assert_allclose(best_of_k_credit(rewards, k), wanted, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(group_value(rewards[None], [k], "pass@B"), pass_at_k(n, right, k), atol=1e-12)


# Three actions, each with the (chance, reward, score, answer) of its outcomes.
CERTAIN = [
    [(1.0, 0.3, 1.0, "a")],
    [(1.0, 1.0, 0.0, "b")],
    [(1.0, -0.4, 1.0, None)],
]
RANDOM = [
    [(0.7, 0.0, 1.0, "a"), (0.3, 1.0, 2.0, "b")],
    [(0.25, 1.0, 1.0, "b"), (0.75, 0.2, 0.5, None)],
    [(0.4, 0.0, 2.0, "a"), (0.6, 1.0, -math.inf, "c")],
]
LOGITS = [0.4, -0.3, 0.1]


def policy(outcomes):
    """The states a sample can be in, their probabilities, and ∇ log π of the action of each."""
    states = [(action, *outcome) for action, rows in enumerate(outcomes) for outcome in rows]
    chosen = np.exp(LOGITS) / np.exp(LOGITS).sum()
    chances = np.array([chosen[action] * chance for action, chance, *_ in states])
    scores = np.eye(3)[[action for action, *_ in states]] - chosen
    return [tuple(rest) for _, _, *rest in states], chances, scores


def exact_objective(outcomes, aggregation, k):
    """E[v(X_1, …, X_k)] and its gradient in the logits, by enumeration and autograd."""
    samples, _, _ = policy(outcomes)
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    actions = [action for action, rows in enumerate(outcomes) for _ in rows]
    luck = torch.tensor([row[0] for rows in outcomes for row in rows], dtype=torch.float64)
    chances = logits.softmax(0)[actions] * luck
    tuples = list(itertools.product(range(len(samples)), repeat=k))
    values = torch.tensor([value_of(aggregation, [samples[i] for i in t]) for t in tuples], dtype=torch.float64)
    objective = (chances[torch.tensor(tuples)].prod(dim=1) * values).sum()
    return objective.item(), torch.autograd.grad(objective, logits)[0].numpy()


def all_groups(outcomes, n):
    """Every group of n samples: rewards, scores, answers, and what turns credits into their expected gradient."""
    samples, chances, scores = policy(outcomes)
    tuples = np.array(list(itertools.product(range(len(samples)), repeat=n)))
    rewards, levels, answers = columns(samples)
    weights = chances[tuples].prod(axis=1)
    return (rewards[tuples], levels[tuples], [[answers[i] for i in t] for t in tuples], weights, scores[tuples] / n)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("outcomes", "n"), [(CERTAIN, 2), (CERTAIN, 4), (RANDOM, 3), (RANDOM, 4)])
def test_expected_gradient_and_value_are_exact(aggregation, outcomes, n):
    rewards, scores, answers, weights, directions = all_groups(outcomes, n)
    for k in range(1, n + 1):
        parallel = np.full(len(rewards), k)
        value, gradient = exact_objective(outcomes, aggregation, 1 if aggregation == "mean" else k)
        credits_ = credit(rewards, parallel, aggregation, scores, answers)
        found = np.einsum("g,gid,gi->d", weights, directions, credits_)
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-10)
        assert np.abs(gradient).max() > 1e-3, "a gradient of 0 would prove nothing"
        assert weights @ group_value(rewards, parallel, aggregation, scores, answers) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "limit"), [(2, 2), (2, 5), (3, 2), (3, 3)])
def test_a_sample_of_the_subsets_is_still_unbiased(k, limit, seed):
    rewards, _, answers, weights, directions = all_groups(RANDOM, 4)
    credits_ = majority_credit(rewards, answers, k, limit=limit, seed=seed)
    found = np.einsum("g,gid,gi->d", weights, directions, credits_)
    np.testing.assert_allclose(found, exact_objective(RANDOM, "majority", k)[1], rtol=0, atol=1e-10)


def test_a_sample_of_the_subsets_comes_near_all_of_them():
    rng = np.random.default_rng(0)
    rewards, answers = rng.normal(size=14), rng.integers(0, 4, size=14).tolist()
    everything = majority_credit(rewards, answers, 7, limit=math.comb(14, 7))
    some = majority_credit(rewards, answers, 7)
    assert not np.array_equal(everything, some)
    np.testing.assert_allclose(some, everything, atol=0.2 * np.abs(everything).max())
    np.testing.assert_array_equal(some, majority_credit(rewards, answers, 7, seed=0))
    assert not np.array_equal(some, majority_credit(rewards, answers, 7, seed=1))


@settings(max_examples=30)
@given(GROUPS, st.floats(-50, 50), st.sampled_from(["mean", "pass@B"]), st.data())
def test_a_constant_added_to_all_rewards_changes_no_credit(samples, constant, aggregation, data):
    k = [budget(data, samples)]
    rewards = columns(samples)[0][None]
    wanted = credit(rewards, k, aggregation)
    np.testing.assert_allclose(credit(rewards + constant, k, aggregation), wanted, atol=1e-10)


@pytest.mark.parametrize("aggregation", ["mean", "pass@B"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_earn_exactly_no_credit(aggregation, reward):
    for n, k in [(2, 1), (7, 3), (7, 7)]:
        assert not credit(np.full((1, n), reward), [k], aggregation).any()


def test_each_group_has_its_own_budget():
    rng = np.random.default_rng(3)
    rewards, scores, ks = rng.normal(size=(5, 6)), rng.integers(0, 3, size=(5, 6)), np.array([3, 1, 6, 2, 3])
    answers = rng.integers(0, 3, size=(5, 6)).astype(object)
    for aggregation in AGGREGATIONS:
        together = credit(rewards, ks, aggregation, scores, answers)
        values = group_value(rewards, ks, aggregation, scores, answers)
        assert together.dtype == np.float64
        assert together.shape == (5, 6)
        assert values.shape == (5,)
        for g in range(5):
            rest = (ks[[g]], aggregation, scores[[g]], answers[[g]])
            np.testing.assert_allclose(together[[g]], credit(rewards[[g]], *rest), atol=1e-13)
            np.testing.assert_allclose(values[[g]], group_value(rewards[[g]], *rest), atol=1e-13)


def test_one_group_needs_no_axis_of_groups():
    rewards, scores, answers = [1.0, 0.0, 2.0], [0.0, 1.0, 1.0], ["a", None, "a"]
    for found, wanted in [
        (leave_one_out(rewards), leave_one_out([rewards])),
        (best_of_k_credit(rewards, 2), best_of_k_credit([rewards], 2)),
        (best_of_k_by_score_credit(rewards, scores, 2), best_of_k_by_score_credit([rewards], [scores], 2)),
        (majority_credit(rewards, answers, 2), majority_credit([rewards], [answers], 2)),
    ]:
        np.testing.assert_array_equal(found, wanted[0])


def test_large_batches_are_quick():
    rng = np.random.default_rng(0)
    rewards, ks = rng.normal(size=(1000, 64)), rng.integers(1, 65, size=1000)
    started = time.process_time()
    assert np.isfinite(best_of_k_credit(rewards, ks)).all()
    assert time.process_time() - started < 1.0
    assert np.isfinite(best_of_k_by_score_credit(rewards[:50], -rewards[:50], ks[:50])).all()


def test_with_baseline():
    np.testing.assert_array_equal(with_baseline([[1.0, 0.5], [0.0, 2.0]], 0.5), [[0.5, 0.0], [-0.5, 1.5]])
    np.testing.assert_array_equal(with_baseline([1.0], 0.0), [1.0])
    with pytest.raises(ValueError, match="`value` is nan"):
        with_baseline([1.0], math.nan)


PAIR = [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leave_one_out([[1.0]]), r"shape \(1, 1\).*n >= 2"),
        (lambda: leave_one_out(1.0), r"shape \(\)"),
        (lambda: leave_one_out(np.zeros((1, 2, 2))), r"shape \(1, 2, 2\)"),
        (lambda: leave_one_out([[0.0, math.nan]]), r"`rewards\[0, 1\]` is nan"),
        (lambda: best_of_k_credit([0.0, math.inf], 1), r"`rewards\[1\]` is inf"),
        (lambda: best_of_k_credit(PAIR, 0), r"`k` is 0.*from 1 to n = 2"),
        (lambda: best_of_k_credit(PAIR, 3), r"`k` is 3.*draw more samples"),
        (lambda: best_of_k_credit(PAIR, 1.0), r"`k` is 1.0"),
        (lambda: best_of_k_credit(PAIR, True), r"`k` is True"),
        (lambda: best_of_k_credit(PAIR, [1, 2]), r"`k` is \[1, 2\].*1 groups"),
        (lambda: best_of_k_by_score_credit(PAIR, [0.0, 1.0], 1), r"`scores` has shape \(2,\)"),
        (lambda: best_of_k_by_score_credit(PAIR, [[0.0, math.nan]], 1), "`scores` .*NaN"),
        (lambda: majority_credit(PAIR, [["a"]], 1), r"`answers` has \[1\]"),
        (lambda: majority_credit(PAIR, [5, 6], 1), "`answers` has"),
        (lambda: majority_credit(PAIR, [["a", ["b"]]], 1), "hashable"),
        (lambda: majority_credit(PAIR, [["a", "b"]], 1, limit=1), "`limit` is 1.*at least 2"),
        (lambda: subset_credit(1, 1, lambda sets: np.zeros(len(sets))), "`n` is 1"),
        (lambda: credit(PAIR, [1], "best"), r"'best'.*'mean', 'pass@B', 'best_of', 'majority'"),
        (lambda: credit(PAIR, [1], "best_of"), "`scores` is None"),
        (lambda: credit(PAIR, [1], "majority"), "`answers` is None"),
        (lambda: group_value(PAIR, [1], "median"), "'median'"),
        (lambda: group_value(PAIR, [3], "pass@B"), "`k` is"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_mean_ignores_the_budget():
    np.testing.assert_array_equal(credit(PAIR, [99], "mean"), [[-1.0, 1.0]])
    np.testing.assert_array_equal(group_value(PAIR, [99], "mean"), [0.5])
