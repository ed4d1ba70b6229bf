"""The action sets of the paper's tables, and greedy coverage against brute force."""

import doctest
import itertools
import json
import math
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hf_adaptive_decode import AutoDecoConfig, actions
from hf_adaptive_decode.actions import (
    ACTION_PRESETS,
    candidate_pool,
    coverage,
    coverage_curve,
    select_actions,
    top_by_mean,
)
from hf_adaptive_decode.errors import SamplingParameterError
from hf_adaptive_decode.types import SamplingParameters
from hf_adaptive_decode.warping import warp_logits

# Each table as it is printed: do_sample, temperature, top_k, top_p, min_p.
TABLES = {
    "math": """
        true   0.75  –   0.9   0.1
        true   1.0   –   0.9   –
        true   1.25  10  0.9   –
        true   1.0   5   0.9   –
        true   1.25  50  0.9   –
        true   1.25  –   –     –
    """,
    "code": """
        true   1.25  –   0.95  0.1
        true   1.25  –   0.95  0.2
        true   1.0   –   0.95  0.2
        true   1.25  50  0.9   0.1
        true   1.25  5   0.9   –
        true   0.75  5   –     0.1
    """,
    "mixed": """
        true   0.5   –   –     –
        true   1.0   –   –     –
        true   1.25  –   –     –
        true   0.75  10  –     –
        true   0.75  10  0.95  0.1
        false  0.0   –   –     –
    """,
    "token_math": """
        false  0     –   –     –
        true   0.5   –   –     –
        true   1.0   –   –     –
        true   1.25  –   –     –
    """,
}
GREEDY = {"temperature": 0.0}
# The best by mean (0) and its near copy (1) against one that solves what they do not (2).
COMPLEMENTARY = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])


def read_table(text):
    rows = []
    for line in text.split("\n"):
        if cells := line.split():
            names = ("do_sample", "temperature", "top_k", "top_p", "min_p")
            row = {name: cell for name, cell in zip(names, cells, strict=True) if cell != "–"}
            assert row.pop("do_sample") == ("false" if float(row["temperature"]) == 0 else "true")
            rows.append({name: float(cell) for name, cell in row.items()})
    return rows


def as_set(configurations):
    return {frozenset(action.items()) for action in configurations}


def brute_force(table, k):
    return max(coverage(table, chosen) for chosen in itertools.combinations(range(table.shape[1]), k))


REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
SMALL = npst.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=REWARDS)
BINARY = npst.arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(1, 7)), elements=st.integers(0, 1))


# --- The tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_preset_is_its_table_row_by_row(name):
    assert ACTION_PRESETS[name] == read_table(TABLES[name])


def test_there_are_four_presets_of_distinct_actions():
    assert list(ACTION_PRESETS) == ["math", "code", "mixed", "token_math"]
    for preset in ACTION_PRESETS.values():
        assert len(as_set(preset)) == len(preset)


def test_the_pool_is_the_product_of_the_ranges():
    expected = []
    for temperature in (0.3, 0.5, 0.75, 1.0, 1.25):
        for top_k in (5, 10, 50, "off"):
            for top_p in (0.9, 0.95, "off"):
                for min_p in (0.1, 0.2, "off"):
                    cells = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
                    expected.append({name: cell for name, cell in cells.items() if cell != "off"})
    pool = candidate_pool()
    assert pool == expected
    assert len(pool) == len(as_set(pool)) == 180
    assert pool[0] == {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    assert pool[-1] == {"temperature": 1.25}


def test_what_was_selected_at_sequence_level_comes_from_the_pool_but_for_greedy():
    pool = as_set(candidate_pool())
    for name in ("math", "code", "mixed"):
        strangers = [action for action in ACTION_PRESETS[name] if frozenset(action.items()) not in pool]
        assert strangers == ([GREEDY] if name == "mixed" else [])


@pytest.mark.parametrize("name", TABLES)
def test_an_adapter_takes_a_preset_and_its_file_keeps_it(name, tmp_path):
    AutoDecoConfig(policy="static", actions=ACTION_PRESETS[name]).save_pretrained(tmp_path)
    assert AutoDecoConfig.from_pretrained(tmp_path).actions == ACTION_PRESETS[name]
    for action in ACTION_PRESETS[name]:
        assert AutoDecoConfig(policy="static", actions=[action]).actions == [action]


def test_an_adapter_takes_every_candidate_and_a_row_of_logits_survives_it():
    pool = candidate_pool(extra=[GREEDY])
    assert AutoDecoConfig(policy="static", actions=pool).actions == pool
    logits = torch.randn(2, 100)
    for action in pool:
        assert AutoDecoConfig(policy="static", actions=[action]).actions == [action]
        assert warp_logits(logits, SamplingParameters(**action)).isfinite().any(-1).all()


def test_every_value_is_a_plain_number_under_a_known_name():
    for action in [*candidate_pool(), *itertools.chain(*ACTION_PRESETS.values())]:
        assert set(action) <= {"temperature", "top_k", "top_p", "min_p"}
        assert type(action["temperature"]) is float
        assert "top_k" not in action or type(action["top_k"]) is int


def test_extras_come_last_in_their_order_and_once():
    extra = [{"temperature": 2.0}, GREEDY, {"temperature": 1.25}, {"temperature": 2.0}, {"temperature": 0}]
    assert candidate_pool(extra)[180:] == [{"temperature": 2.0}, GREEDY]
    assert candidate_pool(action for action in extra)[:180] == candidate_pool()


def test_an_extra_that_samples_like_a_candidate_is_left_out():
    same = [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"min_p": 0.1, "top_p": 0.9, "top_k": 5.0, "temperature": 0.3},
        {"temperature": 0.5, "top_k": None},
        {},
    ]
    assert candidate_pool(same) == candidate_pool()
    assert candidate_pool([GREEDY, {"temperature": 0.0, "top_p": 0.9}])[180:] == [GREEDY]
    assert candidate_pool([{"temperature": 2.0, "top_k": None}])[180:] == [{"temperature": 2.0}]


@pytest.mark.parametrize(
    "extra",
    [
        [{"temperature": -1}],
        [{"top_p": 1.5}],
        [{"top_k": 2.5}],
        [{"temperature": float("nan")}],
        [{"temperature": True}],
        [{"temperature": [1.0]}],
        [{"beams": 4}],
        [{"action": 1}],
        GREEDY,
        ["greedy"],
    ],
)
def test_an_impossible_extra_is_refused_by_its_place(extra):
    with pytest.raises(SamplingParameterError, match=re.escape("extra[0]")):
        candidate_pool(extra)


def test_a_pool_may_be_changed_without_changing_the_next():
    pool = candidate_pool(extra=[GREEDY])
    for action in pool:
        action.clear()
    assert len(as_set(candidate_pool(extra=[GREEDY]))) == 181
    assert GREEDY == {"temperature": 0.0}


# --- Coverage ---------------------------------------------------------------------------------------------------------


def test_coverage_is_the_mean_of_the_best():
    assert coverage(COMPLEMENTARY, [0]) == 0.75
    assert coverage(COMPLEMENTARY, [1, 2]) == 0.75
    assert coverage(COMPLEMENTARY, (2, 0, 0)) == 1.0
    assert coverage([[0.25, 0.5], [-1.0, -3.0]], np.array([0, 1])) == pytest.approx((0.5 - 1.0) / 2)


@given(SMALL, st.data())
def test_coverage_is_monotone_and_submodular(table, data):
    columns = range(table.shape[1])
    large = data.draw(st.sets(st.sampled_from(columns), min_size=1))
    small = data.draw(st.sets(st.sampled_from(sorted(large)), min_size=1))
    new = data.draw(st.sampled_from(columns))

    def value(chosen):
        return coverage(table, sorted(chosen))

    assert value(small) <= value(large) <= value(large | {new})
    assert value(small | {new}) - value(small) >= value(large | {new}) - value(large) - 1e-12
    # And from the empty set, whose F is 0.
    assert value({new}) >= value(large | {new}) - value(large) - 1e-12


# --- Greedy selection -------------------------------------------------------------------------------------------------


@given(st.one_of(SMALL, BINARY), st.data())
def test_greedy_reaches_its_guarantee(table, data):
    k = data.draw(st.integers(1, table.shape[1]))
    picked = select_actions(table, k)
    assert len(set(picked)) == k
    assert all(type(column) is int and 0 <= column < table.shape[1] for column in picked)
    optimum = brute_force(table, k)
    assert (1 - 1 / math.e) * optimum - 1e-12 <= coverage(table, picked) <= optimum
    assert coverage(table, picked[:1]) == brute_force(table, 1)


@given(st.one_of(SMALL, BINARY))
def test_each_pick_is_the_lowest_index_of_the_best_or_the_best_mean_once_nothing_is_gained(table):
    rewards = [[float(reward) for reward in row] for row in table]

    def total(chosen):
        return math.fsum(max(row[column] for column in chosen) for row in rewards)

    picked = []
    for _ in range(table.shape[1]):
        rest = [column for column in range(table.shape[1]) if column not in picked]
        key = {column: total([*picked, column]) for column in rest}
        if picked and max(key.values()) <= total(picked):
            key = {column: total([column]) for column in rest}
        picked.append(min(rest, key=lambda column: (-key[column], column)))
    assert select_actions(table, table.shape[1]) == picked


@given(st.one_of(SMALL, BINARY), st.randoms(use_true_random=False))
def test_the_order_of_the_problems_changes_nothing(table, random):
    shuffled = list(table)
    random.shuffle(shuffled)
    k = table.shape[1]
    assert select_actions(np.array(shuffled), k) == select_actions(table, k)
    assert top_by_mean(np.array(shuffled), k) == top_by_mean(table, k)
    assert coverage_curve(np.array(shuffled)) == coverage_curve(table)


def test_tenths_tie_exactly_in_whatever_order_they_are_added():
    column = np.array([0.1, 0.7, 0.2, 1e-9, 0.3, 0.6] * 40)
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(column) for _ in range(30)], axis=1)
    assert top_by_mean(table, 30) == list(range(30))
    assert select_actions(table, 1) == [0]


@given(st.one_of(SMALL, BINARY))
def test_the_first_picks_are_those_of_a_smaller_k(table):
    longest = select_actions(table, table.shape[1])
    for k in range(1, table.shape[1] + 1):
        assert select_actions(table, k) == longest[:k]


@given(BINARY)
def test_greedy_is_never_worse_than_the_best_single_action(table):
    assume(table.shape[1] > 1)
    assert coverage(table, select_actions(table, 2)) >= coverage(table, top_by_mean(table, 1))


def test_coverage_beats_the_highest_means_where_actions_complement_each_other():
    assert top_by_mean(COMPLEMENTARY, 2) == [0, 1]
    assert select_actions(COMPLEMENTARY, 2) == [0, 2]
    assert coverage(COMPLEMENTARY, [0, 1]) == 0.75
    assert coverage(COMPLEMENTARY, [0, 2]) == 1.0


def test_greedy_is_not_always_optimal():
    # The textbook case: the largest set is part of no best pair.
    sets = [{0, 1, 2, 3}, {0, 1, 4}, {2, 3, 5}]
    table = np.array([[problem in solved for solved in sets] for problem in range(6)])
    assert select_actions(table, 2) == [0, 1]
    assert coverage(table, [0, 1]) == pytest.approx(5 / 6)
    assert brute_force(table, 2) == coverage(table, [1, 2]) == 1.0


def test_ties_go_to_the_lowest_index_and_then_to_the_mean():
    assert select_actions(np.zeros((3, 4)), 4) == [0, 1, 2, 3]
    assert select_actions(np.eye(4), 4) == [0, 1, 2, 3]
    # Column 3 solves all; of the rest none gains, and their means are 1/3, 0, 2/3, 2/3.
    table = [[1, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert select_actions(table, 5) == [3, 2, 4, 0, 1]
    assert top_by_mean(table, 5) == [3, 2, 4, 0, 1]


def test_a_lower_mean_wins_while_it_still_gains():
    table = [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0.01]]
    assert select_actions(table, 3) == [0, 2, 1]
    assert top_by_mean(table, 3) == [0, 1, 2]


def test_rewards_need_be_neither_binary_nor_positive():
    table = np.array([[0.2, 0.9, 0.1], [0.7, 0.1, 0.2], [0.3, 0.1, 0.8]])
    assert select_actions(table, 3) == [0, 1, 2]  # gains of 0.7 and then 0.5
    assert select_actions(table - 5, 3) == [0, 1, 2]
    assert select_actions(table * 1e299, 2) == [0, 1]
    assert coverage(table, [0, 1]) == pytest.approx((0.9 + 0.7 + 0.3) / 3)


@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        torch.tensor,
        lambda t: t.astype(bool),
        lambda t: t.astype(np.float32),
        lambda t: t.astype("O"),
    ],
)
def test_a_table_may_come_in_any_numeric_form(convert):
    table = convert(COMPLEMENTARY)
    assert select_actions(table, np.int64(2)) == [0, 2]
    assert coverage(table, [0, 2]) == 1.0


def test_rewards_are_left_as_they_are():
    table = np.random.default_rng(0).random((20, 9))
    before = table.copy()
    select_actions(table, 9)
    coverage_curve(table)
    assert (table == before).all()


# --- Figure 6 ---------------------------------------------------------------------------------------------------------


@given(st.one_of(SMALL, BINARY))
def test_a_curve_holds_the_coverage_of_each_choice_and_only_rises(table):
    curve = coverage_curve(table)
    assert curve["k"] == list(range(1, table.shape[1] + 1))
    for k, greedy, top in zip(curve["k"], curve["greedy_coverage"], curve["top_by_mean"], strict=True):
        assert greedy == coverage(table, select_actions(table, k))
        assert top == coverage(table, top_by_mean(table, k))
    for name in ("greedy_coverage", "top_by_mean"):
        assert curve[name] == sorted(curve[name])
    assert curve["greedy_coverage"][0] == curve["top_by_mean"][0]
    assert curve["greedy_coverage"][-1] == curve["top_by_mean"][-1]


def test_a_curve_takes_the_points_asked_for():
    curve = coverage_curve(COMPLEMENTARY, ks=iter([3, 1, np.int64(2)]))
    assert curve == {"k": [3, 1, 2], "greedy_coverage": [1.0, 0.75, 1.0], "top_by_mean": [1.0, 0.75, 0.75]}
    assert json.loads(json.dumps(curve)) == curve
    assert coverage_curve(COMPLEMENTARY, ks=[]) == {"k": [], "greedy_coverage": [], "top_by_mean": []}


# --- Refusals ---------------------------------------------------------------------------------------------------------

USES = [
    lambda table: select_actions(table, 1),
    lambda table: top_by_mean(table, 1),
    lambda table: coverage(table, [0]),
    coverage_curve,
]


@pytest.mark.parametrize("use", USES, ids=["select_actions", "top_by_mean", "coverage", "coverage_curve"])
@pytest.mark.parametrize(
    ("table", "found"),
    [
        ([1, 0], r"shape \(2,\)"),
        (1.0, r"shape \(\)"),
        ([], r"shape \(0,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)"),
        ([[0.0, 1.0], [float("nan"), 1.0]], r"rewards\[1, 0\]` is nan"),
        ([[0.0, float("inf")]], r"rewards\[0, 1\]` is inf"),
        ([[0.0, -1e301]], r"rewards\[0, 1\]` is -1e\+301"),
        ([[1.0, None]], r"rewards\[0, 1\]` is nan"),
        ([[1.0], [1.0, 0.0]], "inhomogeneous"),
        ([["right", "wrong"]], "right"),
        ({"a": 1}, "dict"),
    ],
)
def test_what_is_no_table_of_rewards_is_refused(use, table, found):
    with pytest.raises(ValueError, match=found) as refusal:
        use(table)
    assert "`rewards" in str(refusal.value)
    assert "it has to be [problems, candidates] finite numbers" in str(refusal.value)


@pytest.mark.parametrize("k", [0, -1, 4, 1.0, "2", None, True, float("nan")])
def test_a_k_that_cannot_be_is_refused(k):
    for name, use in (
        ("k", lambda: select_actions(COMPLEMENTARY, k)),
        ("k", lambda: top_by_mean(COMPLEMENTARY, k)),
        ("ks[1]", lambda: coverage_curve(COMPLEMENTARY, ks=[1, k])),
    ):
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is {k!r}; it has to be a whole number from 1 to 3.")):
            use()


@pytest.mark.parametrize("column", [-1, 3, 0.0, "0", True])
def test_a_column_that_is_not_there_is_refused(column):
    with pytest.raises(ValueError, match=re.escape(f"`chosen[1]` is {column!r}; it has to be a whole number from 0")):
        coverage(COMPLEMENTARY, [0, column])


def test_an_empty_choice_has_no_coverage():
    with pytest.raises(ValueError, match="`chosen` is empty"):
        coverage(COMPLEMENTARY, [])


# --- Speed and examples -----------------------------------------------------------------------------------------------


def test_sixteen_of_the_pool_on_500_problems_take_no_time():
    rng = np.random.default_rng(0)
    for table in (rng.random((500, 180)), rng.random((500, 180)) < rng.random((500, 1)) * 0.1):
        start = time.process_time()
        assert len(select_actions(table, 16)) == 16
        assert time.process_time() - start < 0.8


@pytest.mark.parametrize("name", ["candidate_pool", "coverage", "select_actions", "coverage_curve"])
def test_the_examples_in_the_docstrings_hold(name):
    text = re.sub(r"^ *```.*$", "", getattr(actions, name).__doc__, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, vars(actions), name, None, None)
    assert test.examples
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
