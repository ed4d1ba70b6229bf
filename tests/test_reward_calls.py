"""Calls of rewards: TRL's signature, what counts as an answer, what a failure does, and deadlines that are kept."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode.errors import AdaptiveDecodeError
from hf_adaptive_decode.rewards.calls import RewardError, RewardFunctions

NAN = math.nan
forks = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
TIMEOUTS = [None, pytest.param(20.0, marks=forks)]


def call(functions, completions=("a", "bb", "ccc"), columns=None, *, groups=None, state=None, **options):
    prompts, ids = ["p"] * len(completions), [[len(text)] for text in completions]
    rewards = RewardFunctions(functions, **options)
    return rewards(prompts, list(completions), ids, columns or {}, groups=groups, trainer_state=state)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def length_later(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def fails_on(bad):
    def reward(completions, log_metric, log_extra, **kwargs):
        log_metric("calls", len(completions))
        log_extra("text", completions)
        if bad in completions:
            raise KeyError(bad)
        return length(completions)

    return reward


# What a function is handed


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_function_is_handed_what_trl_hands_it(timeout):
    state = object()

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        assert (prompts, completions, completion_ids) == (["p"] * 3, ["a", "bb", "ccc"], [[1], [2], [3]])
        assert columns == {"solution": [4, 5, 6]}
        assert trainer_state is state
        log_metric("mean", 1)
        log_metric("mean", torch.tensor(2.0))
        log_extra("doubled", np.array([8, 10, 12]))
        return columns["solution"]

    found = call(reward, columns={"solution": (4, 5, 6)}, state=state, timeout=timeout)
    assert found.values.tolist() == [[4, 5, 6]]
    assert found.values.dtype == found.total.dtype == np.float64
    assert found.metrics == {"mean": 1.5}
    assert found.extra == {"doubled": [8, 10, 12]}
    assert found.skipped == 0


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_function_without_kwargs_is_handed_what_it_names(timeout):
    def short(completions):
        return [1] * len(completions)

    async def column(solution, log_metric=None):
        log_metric("named", 3)
        return solution

    found = call([short, column], columns={"solution": [7, 8, 9], "other": ["x"] * 3}, timeout=timeout)
    assert found.values.tolist() == [[1, 1, 1], [7, 8, 9]]
    assert found.metrics == {"named": 3.0}


def test_a_missing_column_is_named_before_anything_is_called():
    def reward(completions, solution, **kwargs):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"'reward' needs the columns \['solution'\].*'answer'"):
        call(reward, columns={"answer": [1, 2, 3]}, on_error="skip")


def test_columns_pair_up_and_keep_to_their_names():
    with pytest.raises(ValueError, match="3 completions and 2 entries of `solution`"):
        call(length, columns={"solution": [1, 2]})
    with pytest.raises(ValueError, match="entries of `groups`"):
        call(length, groups=[0, 1])
    with pytest.raises(ValueError, match="log_metric"):
        call(length, columns={"log_metric": [1, 2, 3]})


def test_names_are_unique():
    class Judge:
        def __call__(self, **kwargs):
            return [1.0]

    def length_2(completions):
        return [1.0]

    functions = [length, length_2, length, Judge(), functools.partial(length, x=1)]
    assert RewardFunctions(functions).names == ["length", "length_2", "length_3", "Judge", "length_4"]


def test_a_column_that_two_rewards_log_is_kept_twice():
    def one(completions, log_extra):
        log_extra("seen", completions)
        return [1] * len(completions)

    def two(completions, log_extra):
        log_extra("seen", [0] * len(completions))
        return [2] * len(completions)

    assert call([one, two]).extra == {"seen": ["a", "bb", "ccc"], "two/seen": [0, 0, 0]}


# Asynchronous functions


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_synchronous_and_asynchronous_functions_keep_their_order(timeout):
    class Judge:
        async def __call__(self, completions, **kwargs):
            return [-1] * len(completions)

    found = call([length_later, length, Judge()], weights=[1, 10, 100], timeout=timeout)
    assert found.values.tolist() == [[1, 2, 3], [1, 2, 3], [-1, -1, -1]]
    assert found.total.tolist() == [-89, -78, -67]


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_asynchronous_functions_run_together(timeout):
    async def slow(completions):
        await asyncio.sleep(0.4)
        return [1] * len(completions)

    start = time.monotonic()
    call([slow] * 5, timeout=timeout)
    assert time.monotonic() - start < 1.2


def test_a_caller_inside_a_running_loop_gets_its_rewards():
    async def notebook():
        return call([length_later, length])

    assert asyncio.run(notebook()).total.tolist() == [2, 4, 6]


def test_the_loop_outlasts_a_call():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1] * len(completions)

    rewards = RewardFunctions(reward)
    for _ in range(2):
        rewards(["p"], ["a"], [[1]], {})
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_an_asynchronous_function_cannot_take_the_loop_with_it(error):
    async def reward(completions):
        raise error("out")

    with pytest.raises(RewardError, match=f"{error.__name__}: out for the prompt at index 0"):
        call(reward)


# Answers


@pytest.mark.parametrize("timeout", TIMEOUTS)
@pytest.mark.parametrize(
    "values",
    [
        [1, None, 0.5],
        (True, None, np.float32(0.5)),
        [torch.tensor(1.0), None, Decimal("0.5")],
        np.array([1.0, None, 0.5], dtype=object),
    ],
)
def test_none_is_not_applicable(values, timeout):
    found = call([lambda **kwargs: values, length], weights=[2, 1], timeout=timeout)
    np.testing.assert_array_equal(found.values, [[1, NAN, 0.5], [1, 2, 3]])
    np.testing.assert_array_equal(found.total, [3, 2, 4])


def test_arrays_and_tensors_are_answers():
    found = call([lambda **kwargs: np.arange(3), lambda **kwargs: torch.arange(3, dtype=torch.bfloat16)])
    assert found.values.tolist() == [[0, 1, 2]] * 2


def test_where_no_function_applies_there_is_no_total():
    found = call([lambda **kwargs: [None, 1, None], lambda **kwargs: [None, None, 0]], weights=[1, -2])
    np.testing.assert_array_equal(found.total, [NAN, 1, 0])
    assert found.skipped == 0


@pytest.mark.parametrize("timeout", TIMEOUTS)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, "1.0", [1.0], 10**400, 1j, np.ones(1), torch.ones(1)])
def test_anything_but_a_finite_number_is_an_error_with_its_place(value, on_error, timeout):
    with pytest.raises(RewardError, match=r"'<lambda>' gave .* for completion 2, of the prompt at index 41") as caught:
        call(lambda **kwargs: [1, None, value], groups=[40, 40, 41], on_error=on_error, timeout=timeout)
    assert isinstance(caught.value, AdaptiveDecodeError)


@pytest.mark.parametrize("timeout", TIMEOUTS)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_wrong_length_is_an_error(on_error, timeout):
    with pytest.raises(RewardError, match="'<lambda>' gave 2 rewards for 3 completions"):
        call(lambda **kwargs: [1, 2], on_error=on_error, timeout=timeout)


@pytest.mark.parametrize("result", [None, 1.0, "abc", {0: 1, 1: 1, 2: 1}, {1, 2, 3}, torch.tensor(1.0), iter("abc")])
def test_what_is_no_list_is_an_error(result):
    with pytest.raises(RewardError, match=r"'<lambda>' gave .*it has to give a list"):
        call(lambda **kwargs: result, on_error="skip")


def test_the_place_of_a_wrong_value_is_right_when_prompts_are_tried_one_by_one():
    def reward(completions):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return ["x"] if completions == ["ccc"] else [1]

    with pytest.raises(RewardError, match="gave 'x' for completion 2, of the prompt at index 9"):
        call(reward, groups=[7, 8, 9])


# Failures


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_failure_names_the_prompt(timeout):
    with pytest.raises(RewardError, match="'reward' raised KeyError: 'ccc' for the prompt at index 12; ") as caught:
        call(fails_on("ccc"), ["a", "bb", "ccc", "dd"], groups=[11, 11, 12, 13], timeout=timeout)
    assert "reward_errors=" in str(caught.value)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError) if timeout is None else "raise KeyError(bad)" in str(cause)


def test_an_asynchronous_failure_names_the_prompt():
    async def reward(completions, **kwargs):
        return fails_on("bb")(completions, lambda *_: None, lambda *_: None)

    with pytest.raises(RewardError, match="index 1;"):
        call([length_later, reward])


def test_a_failure_of_the_batch_alone_says_so():
    def reward(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1]

    with pytest.raises(RewardError, match=r"ValueError: too many for 3 completions.*not be pinned to one") as caught:
        call(reward)
    assert isinstance(caught.value.__cause__, ValueError)
    assert call(reward, on_error="skip").total.tolist() == [1, 1, 1]


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_skipped_prompts_are_counted_and_named(timeout, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_decode"):
        found = call(
            [fails_on("bb"), length, fails_on("ccc")],
            ["a", "bb", "x", "ccc", "dd"],
            groups=[5, 6, 6, 7, 8],
            on_error="skip",
            timeout=timeout,
        )
    np.testing.assert_array_equal(found.values, [[1, NAN, NAN, 3, 2], [1, 2, 1, 3, 2], [1, 2, 1, NAN, 2]])
    np.testing.assert_array_equal(found.total, [3, NAN, NAN, NAN, 6])
    assert found.skipped == 3
    assert "KeyError: 'bb'; skipped the prompts at [6]" in caplog.text
    assert "[7]" in caplog.text
    # Of calls that gave an answer only, and one row a completion.
    assert found.metrics == {"calls": pytest.approx((3 * 1 + 2 * 1 + 2) / 6)}
    assert found.extra["text"] == ["a", None, None, "ccc", "dd"]


def test_an_interrupt_is_no_failure_of_the_reward():
    def reward(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(reward, on_error="skip")


# Deadlines


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stubborn(folder):
    """Sleeps, deaf to SIGTERM, beside a daemon and a program that do as much; leaves the numbers of all three."""

    def sleep():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    def reward(completions):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemon = multiprocessing.get_context("fork").Process(target=sleep, daemon=True)
        daemon.start()
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "pids").write_text(f"{os.getpid()} {daemon.pid} {program.pid}")
        time.sleep(60)

    return reward


def assert_gone(pids):
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)
    deadline = time.monotonic() + 1
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))
    assert not multiprocessing.active_children()


@forks
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes cannot be looked at")
def test_a_late_function_is_killed_with_all_it_started(tmp_path):
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"TimeoutError: no answer within 0\.5 s for the prompt at index 3"):
        call(stubborn(tmp_path), ["a", "b"], groups=[3, 3], timeout=0.5)
    assert time.monotonic() - start < 1.5
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@forks
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes cannot be looked at")
def test_what_a_function_leaves_behind_ends_with_its_answer(tmp_path):
    def reward(completions):
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pids").write_text(f"{os.getpid()} {program.pid}")
        return length(completions)

    assert call(reward, timeout=20).total.tolist() == [1, 2, 3]
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@forks
def test_late_prompts_are_skipped():
    def reward(completions):
        time.sleep(60 if "bb" in completions else 0)
        return length(completions)

    async def later(completions):
        await asyncio.sleep(60 if "ccc" in completions else 0)
        return length(completions)

    found = call([reward, later], on_error="skip", timeout=0.5)
    np.testing.assert_array_equal(found.values, [[1, NAN, 3], [1, 2, NAN]])
    np.testing.assert_array_equal(found.total, [2, NAN, NAN])
    assert found.skipped == 2


@forks
def test_a_process_that_dies_without_an_answer_is_a_failure():
    def reward(completions):
        # Holds the pipe open beyond its parent's death.
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
        os._exit(3)

    start = time.monotonic()
    with pytest.raises(RewardError, match="exit code 3 and gave no answer for the prompt at index 0"):
        call(reward, timeout=20)
    assert time.monotonic() - start < 2
    with pytest.raises(RewardError, match="exit code -9"):
        call(lambda completions: os.kill(os.getpid(), signal.SIGKILL), timeout=20)


@forks
def test_long_answers_come_through_and_objects_as_text():
    count = 50_000

    def reward(completions, log_extra):
        log_extra("text", [Path("x" * 20)] * count)
        return np.arange(count)

    async def other(completions):
        return [0.1] * count

    found = call([reward, other, other], ["a"] * count, timeout=20)
    assert found.total[-1] == count - 1 + 0.2
    assert found.extra["text"][0] == "x" * 20


@forks
def test_what_a_reward_prints_is_not_lost(capfd):
    def reward(completions):
        sys.__stdout__.write("said")
        return length(completions)

    call(reward, timeout=20)
    sys.__stdout__.flush()
    assert "said" in capfd.readouterr().out


def test_a_deadline_needs_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert call(length).total.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=f"fork, which {sys.platform} lacks"):
        call(length, timeout=1)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": []}, "one callable or several"),
        ({"functions": [length, "length"]}, "'length'"),
        ({"functions": 3}, "Got 3"),
        ({"functions": [length], "weights": [1, 2]}, "1 reward functions and 2 weights"),
        ({"functions": length, "weights": [NAN]}, "finite"),
        ({"functions": length, "weights": ["1"]}, "finite"),
        ({"functions": length, "on_error": "ignore"}, "'ignore'"),
        ({"functions": length, "timeout": 0}, "Got 0"),
        ({"functions": length, "timeout": math.inf}, "Got inf"),
        ({"functions": length, "timeout": "1"}, "Got '1'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(**arguments)


# TRL's own


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_trl_rewards_pass_unchanged(timeout):
    trl = pytest.importorskip("trl.rewards", reason="trl is not installed")
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    said = ["<think>2+2</think>\\boxed{4}", "\\boxed{5}", "\\boxed{4}"]
    overlong = trl.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=5)
    functions = [trl.accuracy_reward, trl.think_format_reward, trl.get_cosine_scaled_reward(max_len=100), overlong]
    rewards = RewardFunctions(functions, timeout=timeout)
    found = rewards(
        prompts=[[{"role": "user", "content": "2+2"}]] * 3,
        completions=[[{"role": "assistant", "content": text}] for text in said],
        completion_ids=[[1] * 50, [1] * 50, [1]],
        columns={"solution": ["$4$", "$4$", ""]},
    )
    expected = [[1, 0, NAN], [1, 0, 0], [0.75, -0.75, NAN], [-1, -1, 0]]
    np.testing.assert_allclose(found.values, expected)
    np.testing.assert_allclose(found.total, [1.75, -1.75, 0])
    assert found.extra["answer_parsed"][2] == "[skipped]"
    assert rewards.names[:3] == ["accuracy_reward", "think_format_reward", "cosine_scaled_reward"]


# Against a slow loop

numbers = st.floats(-1e6, 1e6)
cells = st.one_of(st.none(), st.just("raises"), numbers)
tables = st.integers(1, 5).flatmap(
    lambda wide: st.lists(st.tuples(numbers, st.lists(cells, min_size=wide, max_size=wide)), min_size=1, max_size=4)
)


@given(tables, st.lists(st.booleans(), min_size=4, max_size=4))
def test_totals_equal_a_slow_loop(table, is_async):
    def lookup(row, completions):
        values = [row[int(text)] for text in completions]
        if "raises" in values:
            raise ValueError("raises")
        return values

    def reward(row, later):
        async def asynchronous(completions):
            return lookup(row, completions)

        return asynchronous if later else lambda completions: lookup(row, completions)

    rows, weights = [row for _, row in table], [weight for weight, _ in table]
    functions = [reward(row, later) for row, later in zip(rows, is_async, strict=False)]
    wide = len(rows[0])
    logging.disable(logging.WARNING)
    found = call(functions, [str(place) for place in range(wide)], weights=weights, on_error="skip")
    logging.disable(logging.NOTSET)
    for place in range(wide):
        column = [row[place] for row in rows]
        total = sum(weight * value for weight, value in zip(weights, column, strict=True) if isinstance(value, float))
        if "raises" in column or not any(isinstance(value, float) for value in column):
            total = NAN
        np.testing.assert_allclose(found.total[place], total, rtol=1e-9, atol=1e-3)
    assert found.skipped == sum("raises" in column for column in zip(*rows, strict=True))
