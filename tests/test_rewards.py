"""Exact and mathematical rewards: what counts as equal, what hostile text can do to them, and TRL's signature."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode.errors import AdaptiveDecodeError, MissingExtraError
from hf_adaptive_decode.rewards import exact_match_reward, math_reward
from hf_adaptive_decode.rewards import math as math_module
from hf_adaptive_decode.rewards.exact import as_number, is_exact_match

SLACK = 1.5  # seconds that a busy machine may need to kill and reap


@pytest.fixture(scope="module")
def math_verify():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    math_reward(completions=["1"], solution=["1"])
    yield
    math_module._POOL.close()


def exact(completion, solution):
    return exact_match_reward(completions=[completion], solution=[solution])[0]


def score(completion, solution, **arguments):
    return math_reward(completions=[completion], solution=[solution], **arguments)[0]


# Both signatures


@pytest.mark.parametrize("reward", [exact_match_reward, math_reward])
def test_a_reward_takes_what_trl_passes(reward, math_verify):
    said = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "so \\boxed{4}"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "so \\boxed{4}"}]}]
    values = reward(
        prompts=["a", "b", "c", "d"],
        completions=["\\boxed{4}", said, parts, "\\boxed{5}"],
        completion_ids=[[1], [2], [3], [4]],
        solution=["4", "4", "4", None],
        trainer_state=None,
        log_extra=None,
    )
    assert values == [1.0, 1.0, 1.0, None]


@pytest.mark.parametrize("reward", [exact_match_reward, math_reward])
def test_columns_have_to_pair_up(reward):
    with pytest.raises(ValueError, match=r"2 completions and 1 entries of `solution`"):
        reward(completions=["1", "2"], solution=["1"])
    with pytest.raises(ValueError, match=r"1 completions and 3 entries of `solution`"):
        reward(completions=["1"], solution=["1", "2", "3"])
    with pytest.raises(ValueError, match="`solution` has to be a list"):
        reward(completions=["1"], solution="1")
    assert reward(completions=[], solution=[]) == []


@pytest.mark.parametrize("reward", [exact_match_reward, math_reward])
def test_a_completion_has_to_be_text_or_messages(reward):
    with pytest.raises(ValueError, match="Completion 0 is a int"):
        reward(completions=[3], solution=["3"])


def test_importing_the_rewards_loads_nothing_heavy():
    heavy = ("torch", "transformers", "math_verify", "sympy")
    look = "import sys, hf_adaptive_decode.rewards as r; r.math_reward; r.code_reward"
    code = f"{look}; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# Exact


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("The answer is \\boxed{42}.", "42"),
        ("first \\boxed{1}, then \\boxed{42}", "42"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\dfrac12}", "1/2"),
        ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("6 * 7 = 42\n#### 42", "We multiply.\n#### 42"),
        ("#### 1,234,567", "1234567"),
        ("So the total is $1,000.50.", "1000.5"),
        ("He walks 12 km", "12"),
        ("\\boxed{12\\text{ km}}", "12 km"),
        ("It is 50%", "50"),
        ("thinking\nx = 7\n\n", 7),
        ("Paris", " paris. "),
        ("\\boxed{\\text{Paris}}", "Paris"),
        ("\\boxed{x + 1}", "$x+1$"),
        ("1e3", "1000"),
        ("\\boxed{\\left(1, 2\\right)}", "(1,2)"),
    ],
)
def test_the_exact_reward_sees_the_same_answer(completion, solution):
    assert exact(completion, solution) == 1.0


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("42 is not it, 41", "42"),
        ("\\boxed{41} but 42", "42"),
        ("", "42"),
        ("", ""),
        ("\\boxed{}", "0"),
        ("\\boxed{12 miles}", "12 km"),
        ("\\boxed{1/0}", "0"),
        ("1 + x", "x + 1"),
        ("\\boxed{1e999999999}", "1"),
        ("\\boxed{__import__('os').getpid()}", "1"),
        ("-7", "7"),
    ],
)
def test_the_exact_reward_sees_another_answer(completion, solution):
    assert exact(completion, solution) == 0.0


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 50_000, "9" * 200_000, "1," * 100_000, "$" * 200_000, "((((" * 50_000, "1e" * 100_000, " a" * 90_000],
)
def test_the_exact_reward_is_quick_on_hostile_text(text):
    begin = time.monotonic()
    assert exact(text, "42") == 0.0
    assert exact("\\boxed{" + text + "}", "\\frac{1}{2}") == 0.0
    assert time.monotonic() - begin < 2


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_the_exact_reward_never_fails(completion, solution):
    assert exact(completion, solution) in (0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_read_exactly(top, bottom):
    sign = "-" if top < 0 else ""
    assert is_exact_match(f"so \\boxed{{{sign}\\frac{{{abs(top)}}}{{{bottom}}}}}", f"{top}/{bottom}")
    assert as_number(f"{top:,}") == top
    assert not is_exact_match(f"\\boxed{{{top}}}", str(top + 1))


# Mathematical


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{\\frac{2}{4}}", "1/2"),
        ("$2\\sqrt{2}$", "\\sqrt{8}"),
        ("\\boxed{1+x}", "x+1"),
        ("\\boxed{(x+1)^2}", "x^2+2x+1"),
        ("\\boxed{(0, 1]}", "(0,1]"),
        ("\\boxed{(-\\infty,2)\\cup(3,\\infty)}", "$(-\\infty, 2) \\cup (3, \\infty)$"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("\\boxed{50\\%}", "0.5"),
        ("\\boxed{\\frac12}", "50\\%"),
        ("\\boxed{x=3}", "3"),
        ("so\n#### 1,234", "#### 1234"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("first \\boxed{7}, no: \\boxed{8}", "8"),
        ("x = \\boxed{1} or x = \\boxed{2}", "\\{1, 2\\}"),
    ],
)
def test_equal_mathematics(completion, solution, math_verify):
    assert score(completion, solution) == 1.0


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("\\boxed{[0, 1]}", "(0,1]"),
        ("\\boxed{\\{1, 3\\}}", "\\{1,2\\}"),
        ("\\boxed{0.51}", "\\frac{1}{2}"),
        ("\\boxed{x-1}", "x+1"),
        ("\\boxed{41}", "42"),
        ("no answer", "42"),
        ("", "42"),
        ("\\boxed{\\text{Bob}}", "Evelyn"),
        ("\\boxed{42} or \\boxed{43}", "42"),
    ],
)
def test_unequal_mathematics(completion, solution, math_verify):
    assert score(completion, solution) == 0.0


HOSTILE = {
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "python power": "$9**9**9**9$",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 400 + "2" + "}" * 400 + "}",
    "parentheses": "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "braces": "\\boxed{" + "{" * 4000 + "}" * 4000 + "}",
    "factorial": "\\boxed{(10^{10^{10}})!}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_mathematics_ends_in_time(name, math_verify, caplog):
    score("\\boxed{7}", "7")
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert score(HOSTILE[name], "7", timeout=1) == 0.0
    assert time.monotonic() - begin < 1 + SLACK + 3, "a new worker may have to start first, besides"
    assert all(len(record.getMessage()) < 300 for record in caplog.records)
    assert score("\\boxed{7}", "7") == 1.0


def test_of_a_long_text_the_end_is_read(math_verify):
    """Reasoning models write tens of thousands of characters in front of their answer."""
    score("\\boxed{7}", "7")
    reasoning = "Let me see: $\\frac{1}{2}$ of 8 is 4, is it not? Wait. " * 2_000
    begin = time.monotonic()
    assert score(f"{reasoning}So \\boxed{{\\frac{{1}}{{2}}}}", "0.5") == 1.0
    assert score(f"{reasoning}So \\boxed{{7}}", "0.5") == 0.0
    assert score("\\boxed{7}" + " " * 20_000, "7") == 0.0
    assert score("\\boxed{7}", "7" + " " * 20_000) == 0.0
    assert time.monotonic() - begin < 3 + SLACK


def test_a_killed_worker_costs_one_reward_and_is_counted(math_verify, caplog):
    score("\\boxed{7}", "7")
    before = math_module.worker_failures()
    with caplog.at_level(logging.WARNING):
        assert score(HOSTILE["tower"] + "\n" * 500, "7", timeout=0.5) == 0.0
    assert math_module.worker_failures() == before + 1
    assert "reward 0.0" in caplog.text
    assert score("\\boxed{7}", "7") == 1.0


def test_a_worker_that_died_while_idle_is_replaced(math_verify):
    score("\\boxed{7}", "7")
    before = math_module.worker_failures()
    for worker in list(math_module._POOL._idle):
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert score("\\boxed{7}", "7") == 1.0
    assert math_module.worker_failures() == before


def test_workers_are_reused_and_bounded_in_memory(math_verify):
    score("\\boxed{7}", "7")
    first = {worker._process.pid for worker in math_module._POOL._idle}
    assert score("\\boxed{8}", "8") == 1.0
    (worker,) = [w for w in math_module._POOL._idle if w._process.pid in first][-1:]
    with open(f"/proc/{worker._process.pid}/limits") as limits:
        (line,) = [line for line in limits if line.startswith("Max address space")]
    assert line.split()[3] == str(math_module.MEMORY)
    with open(f"/proc/{worker._process.pid}/environ") as environment:
        assert "HOME=" not in environment.read()


def test_comparisons_run_off_the_main_thread_and_at_once(math_verify):
    def several(offset):
        assert threading.current_thread() is not threading.main_thread()
        numbers = range(offset, offset + 5)
        return math_reward(completions=[f"\\boxed{{{n}}}" for n in numbers], solution=[str(n - n % 2) for n in numbers])

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(several, [0, 100, 200]))
    assert results == [[1.0, 0.0, 1.0, 0.0, 1.0]] * 3


def test_without_math_verify_there_is_no_silent_fallback(monkeypatch):
    monkeypatch.setattr(math_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"hf_adaptive_decode\[math\]") as caught:
        score("\\boxed{7}", "7")
    assert isinstance(caught.value, AdaptiveDecodeError)


@pytest.mark.parametrize("arguments", [{"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"workers": 0}])
def test_settings_out_of_range_are_named(arguments):
    (name,) = arguments
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        math_reward(completions=["1"], solution=["1"], **arguments)
