"""pass@k, intervals, the engine, likelihood and rejection sampling; and that the package loads what is asked for."""

import ast
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_base, make_heads_identity, wrap

import hf_adaptive_decode.evaluation
from hf_adaptive_decode.actions import describe
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.evaluation import (
    GREEDY,
    Decoder,
    Task,
    bootstrap_interval,
    evaluate_decoding,
    pass_at_k,
    run_decoder,
)
from hf_adaptive_decode.evaluation.likelihood import text_likelihood
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward
from hf_adaptive_decode.training.rejection import verified_completions

ROOT = Path(__file__).parents[1]


# --- the package ------------------------------------------------------------------------------------------------------


def test_looking_at_the_package_and_asking_for_versions_load_nothing_heavy():
    look = "import sys, hf_adaptive_decode.evaluation as e; dir(e); hasattr(e, 'nonsense')"
    code = f"{look}; from hf_adaptive_decode.evaluation.provenance import environment as f; f(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "datasets"} & set(done.stdout.split())


def test_every_name_can_be_had_and_type_checkers_see_the_same_ones():
    package = hf_adaptive_decode.evaluation
    assert dir(package) == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    tree = ast.parse(Path(package.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(alias.name, line.module) for line in guarded.body for alias in line.names}
    assert seen == set(package._WHERE.items())
    assert {name for name, _ in seen} == set(package.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense


# --- pass@k -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(case):
    n, c, k = case
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_takes_arrays_and_large_numbers():
    assert pass_at_k([4, 4, 4], [0, 1, 4], 2).tolist() == [0.0, 0.5, 1.0]
    expected = 1 - math.comb(9900, 64) / math.comb(10_000, 64)
    assert pass_at_k(10_000, 100, 64) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (3, 1.5, 1), (3.0, 1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="has to be"):
        pass_at_k(n, c, k)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # A percentile bootstrap of 80 numbers covers about 94 %. Fewer than 90 % of 300 intervals would then happen once in
    # 300 runs, and the seed is fixed.
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap_interval(rng.random(80) < 0.3, seed=trial, resamples=1000)
        hits += interval.low <= 0.3 <= interval.high
    assert hits / 300 >= 0.90


def test_an_interval_is_the_one_of_explicit_resampling():
    values = np.random.default_rng(1).normal(size=50)
    rng = np.random.default_rng(2)
    means = [rng.choice(values, 50).mean() for _ in range(20_000)]
    interval = bootstrap_interval(values, resamples=20_000)
    assert interval.mean == pytest.approx(values.mean())
    # The quantiles of 20,000 resamples are known to about 1 % of the spread.
    assert [interval.low, interval.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0]]])
def test_intervals_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(bad)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def testbed():
    return load_base_model(), load_tokenizer(), build_problems("validation", 12)


def test_completions_are_what_generate_gives_each_prompt_alone(testbed):
    model, tokenizer, problems = testbed
    prompts = [row["prompt"] for row in problems]
    groups = complete(model, tokenizer, prompts, samples=2, token_budget=30, settings=GREEDY.settings, batch_rows=5)
    for prompt, group in zip(prompts, groups, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
        assert [one.token_ids for one in group] == [tuple(alone.tolist())] * 2
        assert group[0].ended == (alone[-1] == tokenizer.eos_token_id)
        assert group[0].text == tokenizer.decode(alone, skip_special_tokens=True)


def test_the_same_seed_gives_the_same_completions(testbed):
    model, tokenizer, problems = testbed
    prompts = [row["prompt"] for row in problems]
    how = {"samples": 3, "token_budget": 20, "settings": {"temperature": 1.0}}
    first, again, other = (complete(model, tokenizer, prompts, seed=seed, **how) for seed in (1, 1, 2))
    ids = [[[one.token_ids for one in group] for group in groups] for groups in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_an_adapters_completions_carry_what_they_were_sampled_with(testbed):
    _, tokenizer, problems = testbed
    model = make_heads_identity(wrap(load_base_model()))
    (group,) = complete(model, tokenizer, [problems[0]["prompt"]], samples=4, token_budget=40)
    for one in group:
        assert one.temperature.tolist() == [1.0] * len(one.token_ids)
        assert one.top_p.tolist() == [1.0] * len(one.token_ids)


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_greedy_scores_the_same_in_every_sample(testbed):
    model, tokenizer, problems = testbed
    found = run_decoder(
        model, tokenizer, problems, testbed_reward, GREEDY, samples=3, token_budget=40, show_progress=False
    )
    assert (found.correct == found.correct[:, :1]).all()
    assert found.mean_temperature == 0


def test_a_reward_that_scores_too_few_is_refused(testbed):
    model, tokenizer, problems = testbed
    with pytest.raises(ValueError, match="score each"):
        run_decoder(model, tokenizer, problems[:2], lambda **_: [1.0], GREEDY, samples=2, token_budget=4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": 0.0, "top_p": 0.9}, "greedy"),
        ({"temperature": 0.5, "top_p": 0.9}, "T=0.5, top-p 0.9"),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, "T=1"),
        ({"temperature": 2, "top_k": 10, "min_p": 0.1}, "T=2, top-k 10, min-p 0.1"),
    ],
)
def test_settings_are_named_by_what_they_change(settings, name):
    assert describe(settings) == name


def test_the_best_static_for_each_k_is_the_best_on_validation_problems(testbed):
    model, tokenizer, problems = testbed
    settings = [{"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 1.25, "top_p": 0.9}]
    task = Task("testbed", problems, build_problems("test", 4), testbed_reward)
    how = {"samples": 4, "show_progress": False}
    found = evaluate_decoding(
        model, tokenizer, task, baselines=["best_static"], ks=(1, 4), token_budgets=30, grid=settings[1:], **how
    )
    chosen = {line["for_k"]: line["settings"] for line in found.measures}
    # Validation problems are drawn with the seed one above the one given.
    how |= {"token_budget": 30, "seed": 1}
    measured = [run_decoder(model, tokenizer, problems, testbed_reward, Decoder("", one), **how) for one in settings]
    for k in (1, 4):
        rates = [one.pass_at(k).mean() for one in measured]
        assert chosen[k] == settings[int(np.argmax(rates))]
    assert chosen[1] != chosen[4]


# --- text -------------------------------------------------------------------------------------------------------------


def test_likelihood_is_the_cross_entropy_of_the_models_own_logits():
    model = wrap(build_base("gemma2"))
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    found = text_likelihood(model, rows, [1.0, 0.5])
    assert found.tokens.tolist() == [2, 1]
    for index, row in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        for column, temperature in enumerate((1.0, 0.5)):
            expected = torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="sum")
            assert found.static[index, column] == pytest.approx(expected.item(), rel=1e-5)
    # A fresh temperature head is within a per cent of T = 1.
    assert found.mean_temperature == pytest.approx(1.0, abs=0.02)
    assert found.adapter == pytest.approx(found.static[:, 0], rel=0.02)


# --- training text ----------------------------------------------------------------------------------------------------


def test_every_kept_solution_is_right_and_from_the_coldest_setting_that_solves(testbed):
    model, tokenizer, problems = testbed
    rows = verified_completions(
        model, tokenizer, problems, testbed_reward, samples=3, keep=2, token_budget=40, show_progress=False
    )
    greedy = run_decoder(
        model, tokenizer, problems, testbed_reward, GREEDY, samples=1, token_budget=40, show_progress=False
    )
    solved_cold = {row["prompt"] for row, right in zip(problems, greedy.correct[:, 0], strict=True) if right}
    seen = {}
    for row in rows:
        length = row["labels"].count(-100)
        prompt = tokenizer.decode(row["input_ids"][:length])
        answer = tokenizer.decode(row["input_ids"][length:])
        assert row["labels"][length:] == row["input_ids"][length:]
        assert testbed_reward(prompts=[prompt], completions=[answer]) == [1.0]
        seen[prompt] = seen.get(prompt, 0) + 1
    assert solved_cold <= set(seen)
    assert all(seen[prompt] == 1 for prompt in solved_cold)
    assert max(seen.values()) <= 2
