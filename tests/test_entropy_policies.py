"""Baselines without weights: temperature by the entropy of the logits, and mixtures drawn once a sequence."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM, DecodeState
from hf_adaptive_decode.configuration import read_config
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import AdapterConfigError
from hf_adaptive_decode.evaluation.tokens import token_table
from hf_adaptive_decode.policies import EntropyPolicy, build_policy
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer
from hf_adaptive_decode.types import SamplingParameters
from hf_adaptive_decode.warping import warp_logits

EDT = {"name": "edt", "temperature": 1.2, "theta": 0.3}
DYNATEMP = {"name": "dynatemp", "low": 0.2, "high": 1.6, "exponent": 0.7}
RULES = [EDT, EDT | {"base": 0.5}, DYNATEMP, {"name": "dynatemp", "low": 0.5, "high": 1.5}]
ENDLESS = {"eos_token_id": None, "pad_token_id": tiny.PAD}
NEVER = -math.inf


def policy_of(rule) -> EntropyPolicy:
    return build_policy(AutoDecoConfig(policy="entropy", entropy_rule=rule)).eval()


def decide(rule, logits: torch.Tensor) -> SamplingParameters:
    return policy_of(rule)(DecodeState(torch.zeros(len(logits), 3, dtype=logits.dtype), logits))


def entropy_by_hand(row: list[float]) -> float:
    weights = [math.exp(x - max(row)) for x in row]
    p = [w / sum(weights) for w in weights]
    return -sum(x * math.log(x) for x in p if x > 0)


def by_hand(rule, entropy: float, tokens: int) -> float:
    """The rule's temperature, in Python's double precision, as the methods' authors write it."""
    if rule["name"] == "edt":
        return rule["temperature"] * rule.get("base", 0.8) ** (rule["theta"] / entropy)
    normalised = entropy / math.log(tokens)
    return rule["low"] + (rule["high"] - rule["low"]) * normalised ** rule.get("exponent", 1.0)


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "row",
    [[0.0] * 9, [5.0, 1.0, 0.5, -2.0, 0.0, 3.0, 3.0], [2.0, NEVER, 1.0, NEVER, 0.0, -4.0, -1.0], [1.0, 2.0]],
    ids=["flat", "plain", "masked", "two words"],
)
def test_a_rule_follows_its_formula(rule, row):
    found = decide(rule, torch.tensor([row, row]))
    expected = by_hand(rule, entropy_by_hand(row), sum(x > NEVER for x in row))
    assert found.temperature.tolist() == pytest.approx([expected] * 2, abs=1e-5)
    assert found.temperature.dtype == torch.float32
    assert (found.top_k, found.min_p, found.action) == (None, None, None)


def test_edt_comes_near_its_temperature_where_the_model_is_torn():
    # H = log 4096 = 8.3 nats: 0.8^(0.3 / 8.3) = 0.992.
    assert float(decide(EDT, torch.zeros(1, 4096)).temperature) == pytest.approx(1.2 * 0.992, rel=1e-3)


@pytest.mark.parametrize(
    "row", [[60.0, 0.0, 1.0], [1e4, 0.0, 1.0], [NEVER, 3.0, NEVER], [900.0, -900.0, NEVER]], ids=str
)
def test_where_the_entropy_is_none_edt_is_greedy_and_dynatemp_at_its_lowest(row):
    logits = torch.tensor([row])
    found = decide(EDT, logits)
    assert float(found.temperature) == pytest.approx(0.0, abs=1e-6)
    kept = warp_logits(logits, found).softmax(-1)
    assert kept[0].tolist() == torch.nn.functional.one_hot(logits.argmax(), 3).tolist()
    assert float(decide(DYNATEMP, logits).temperature) == pytest.approx(0.2, abs=1e-6)


def test_tokens_that_are_ruled_out_do_not_count_for_the_highest_entropy():
    flat_over_four = torch.full((1, 1000), NEVER)
    flat_over_four[0, [3, 50, 700, 999]] = 2.0
    assert float(decide(DYNATEMP, flat_over_four).temperature) == pytest.approx(1.6, abs=1e-5)


rules = st.one_of(
    st.fixed_dictionaries(
        {"name": st.just("edt"), "temperature": st.floats(0, 100), "theta": st.floats(0, 100)},
        optional={"base": st.floats(1e-3, 1), "top_p": st.floats(0, 1)},
    ),
    st.fixed_dictionaries(
        {"name": st.just("dynatemp"), "low": st.floats(0, 2), "high": st.floats(2, 100)},
        optional={"exponent": st.floats(0.01, 100), "top_p": st.floats(0, 1)},
    ),
)
logit = st.one_of(st.floats(-1e4, 1e4), st.just(NEVER))
rows = st.lists(logit, min_size=1, max_size=12).filter(lambda row: max(row) > NEVER)


@given(rules, rows)
def test_any_allowed_rule_gives_any_row_a_temperature_within_its_range_that_can_be_sampled_with(rule, row):
    logits = torch.tensor([row])
    found = decide(rule, logits)
    low, high = (0.0, rule["temperature"]) if rule["name"] == "edt" else (rule["low"], rule["high"])
    assert low - 1e-5 * high <= float(found.temperature) <= high * (1 + 1e-5)
    p = warp_logits(logits, found).softmax(-1)
    assert torch.isfinite(p).all()
    assert p.sum() == pytest.approx(1.0, abs=1e-5)


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=20), st.floats(0.1, 0.9))
def test_more_entropy_is_more_temperature(row, cooling):
    logits = torch.tensor([row])
    for rule in RULES:
        warmer, colder = (float(decide(rule, one).temperature) for one in (logits * cooling, logits))
        assert warmer >= colder - 1e-5


@pytest.mark.parametrize("rule", [EDT, DYNATEMP], ids=lambda rule: rule["name"])
def test_a_row_depends_on_itself_alone_in_fp32_and_under_autocast(rule):
    logits = torch.randn(9, 50) * 3
    together = decide(rule, logits).temperature
    alone = torch.cat([decide(rule, logits[i : i + 1]).temperature for i in range(9)])
    assert torch.allclose(alone, together, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decide(rule, logits).temperature, together)
    half = logits.bfloat16()
    assert torch.equal(decide(rule, half).temperature, decide(rule, half.float()).temperature)


def test_a_rule_needs_logits_and_no_weights():
    policy = policy_of(EDT)
    assert policy.needs_logits
    assert not policy.has_actions
    assert not policy.decides_once
    assert policy.state_dict() == {}


# --- its settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        None,
        {},
        "edt",
        [EDT],
        {"temperature": 1.0, "theta": 0.1},
        {"name": "mood", "theta": 0.1},
        {"name": ["edt"]},
        {"name": "edt", "temperature": 1.0},
        {"name": "dynatemp", "low": 0.5},
        EDT | {"thetta": 0.1},
        EDT | {"low": 0.1},
        EDT | {3: 0.1},
        EDT | {"theta": -0.1},
        EDT | {"theta": math.nan},
        EDT | {"theta": math.inf},
        EDT | {"theta": "0.1"},
        EDT | {"theta": True},
        EDT | {"theta": None},
        EDT | {"theta": 10**400},
        EDT | {"temperature": 101},
        EDT | {"base": 0.0},
        EDT | {"base": 1.1},
        EDT | {"top_p": 1.5},
        EDT | {"top_p": None},
        DYNATEMP | {"low": 2.0},
        DYNATEMP | {"exponent": 0.0},
        DYNATEMP | {"high": -1.0},
    ],
    ids=lambda rule: str(rule)[:60],
)
def test_a_bad_rule_is_refused_and_named(rule):
    with pytest.raises(AdapterConfigError, match="entropy_rule"):
        AutoDecoConfig(policy="entropy", entropy_rule=rule)


@pytest.mark.parametrize("policy", [{}, {"policy": "static", "actions": [{"temperature": 0.5}]}], ids=str)
def test_only_an_entropy_policy_takes_a_rule(policy):
    with pytest.raises(AdapterConfigError, match="entropy_rule"):
        AutoDecoConfig(**policy, entropy_rule=EDT)


def test_a_rule_is_not_masked():
    with pytest.raises(AdapterConfigError, match="max_prob_mask"):
        AutoDecoConfig(policy="entropy", entropy_rule=EDT, max_prob_mask=0.9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_survives_json(rule, tmp_path):
    config = AutoDecoConfig(policy="entropy", entropy_rule=rule)
    config.save_pretrained(tmp_path)
    again = read_config(tmp_path / "config.json")
    assert again.entropy_rule == rule
    assert json.loads((tmp_path / "config.json").read_text())["entropy_rule"] == rule
    assert policy_of(again.entropy_rule).rule == policy_of(rule).rule


# --- in use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [EDT, DYNATEMP | {"top_p": 0.9}], ids=lambda rule: rule["name"])
def test_a_saved_rule_generates_as_its_formula_says_and_as_it_did_before(rule, family, tmp_path):
    base = tiny.build_base(family)
    base.save_pretrained(tmp_path / "base")
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="entropy", entropy_rule=rule))
    model.decoding_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    how = {"max_new_tokens": 6, **ENDLESS}
    out = tiny.sample(
        model,
        tiny.prompts(),
        seed=4,
        return_dict_in_generate=True,
        output_decoding_trace=True,
        output_logits=True,
        **how,
    )
    for step, logits in enumerate(out.logits):
        expected = [by_hand(rule, entropy_by_hand(row), len(row)) for row in logits.tolist()]
        assert out.decoding_trace.temperature[:, step].tolist() == pytest.approx(expected, abs=1e-4)
    assert (out.decoding_trace.top_p == rule.get("top_p", 1.0)).all()
    assert out.decoding_trace.action is None

    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.decoding_adapter, EntropyPolicy)
    assert torch.equal(tiny.sample(loaded, tiny.prompts(), seed=4, **how), out.sequences)
    bare = tiny.build_base(family)
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(tmp_path / "adapter", bare)
    found = tiny.sample(bare, tiny.prompts(), seed=4, do_sample=True, top_k=0, logits_processor=[processor], **how)
    assert torch.equal(found, out.sequences)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "entropy" in card
    assert "adaptive-decoding-entropy" in card


@pytest.fixture(scope="module")
def testbed():
    return load_base_model(), load_tokenizer(), [row["prompt"] for row in build_problems("validation", 12)]


@pytest.mark.parametrize("rule", [EDT, DYNATEMP], ids=lambda rule: rule["name"])
def test_the_engine_decodes_by_the_rule(testbed, rule):
    model, tokenizer, prompts = testbed
    found = complete(model, tokenizer, prompts, policy=policy_of(rule), samples=2, token_budget=20)
    table = token_table(model, tokenizer, prompts, found)
    sure = table.entropy < 1e-4
    assert 0 < sure.mean() < 0.9
    vocabulary = model.config.vocab_size
    expected = [by_hand(rule, float(entropy), vocabulary) for entropy in table.entropy[~sure]]
    assert table.temperature[~sure] == pytest.approx(expected, abs=1e-3)
    assert table.temperature[sure] == pytest.approx(rule.get("low", 0.0), abs=1e-2)
    alone = complete(model, tokenizer, prompts, policy=policy_of(rule), samples=2, token_budget=20, batch_rows=1)
    assert [[one.token_ids for one in group] for group in alone] == [
        [one.token_ids for one in group] for group in found
    ]


# --- mixtures, once a sequence ----------------------------------------------------------------------------------------

MIXED = {"policy": "static", "actions": [{"temperature": 0.3}, {"temperature": 1.4, "top_k": 10}, {"top_p": 0.5}]}


def test_a_mixture_draws_each_token_unless_told_to_draw_each_sequence():
    assert AutoDecoConfig(**MIXED).mixture_per == "token"
    assert not build_policy(AutoDecoConfig(**MIXED)).decides_once
    assert build_policy(AutoDecoConfig(**MIXED, mixture_per="sequence")).decides_once


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (MIXED | {"mixture_per": "prompt"}, "mixture_per"),
        (MIXED | {"mixture_per": None}, "mixture_per"),
        (MIXED | {"mixture_per": ["token"]}, "mixture_per"),
        ({"mixture_per": "sequence"}, "mixture_per"),
        (MIXED | {"policy": "token_actions", "mixture_per": "sequence"}, "mixture_per"),
        (MIXED | {"mixture_per": "sequence", "max_prob_mask": 0.9}, "max_prob_mask"),
    ],
    ids=str,
)
def test_a_mixture_that_makes_no_sense_is_refused(settings, named):
    with pytest.raises(AdapterConfigError, match=named):
        AutoDecoConfig(**settings)


def chi_square(counts, weights) -> float:
    expected = np.array(weights) / np.sum(weights) * np.sum(counts)
    return float(((np.array(counts) - expected) ** 2 / expected).sum())


def test_generate_holds_what_a_sequence_drew_and_draws_by_the_weights(tmp_path):
    """600 sequences; 2 degrees of freedom exceed 27.6 with odds of 1e-6."""
    base = tiny.build_base()
    base.save_pretrained(tmp_path / "base")
    weights = [1, 3, 2]
    model = tiny.wrap(base, **MIXED, action_weights=weights, mixture_per="sequence")
    model.decoding_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    model = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter")
    how = {"max_new_tokens": 3, "num_return_sequences": 200, "return_dict_in_generate": True}
    trace = tiny.sample(model, tiny.prompts(3), output_decoding_trace=True, **how, **ENDLESS).decoding_trace
    assert (trace.action == trace.action[:, :1]).all()
    assert chi_square(trace.action[:, 0].bincount(minlength=3).numpy(), weights) < 27.6
    temperature = torch.tensor([0.3, 1.4, 1.0])[trace.action]
    assert torch.equal(trace.temperature, temperature)
    again = tiny.sample(model, tiny.prompts(3), seed=1, output_decoding_trace=True, **how, **ENDLESS).decoding_trace
    assert not torch.equal(again.action, trace.action)  # held for a call, not for ever


def test_the_engine_holds_what_a_sequence_drew_while_others_end(testbed):
    """384 completions; 2 degrees of freedom exceed 27.6 with odds of 1e-6."""
    model, tokenizer, prompts = testbed
    policy = build_policy(AutoDecoConfig(**MIXED, mixture_per="sequence"))
    how = {"policy": policy, "samples": 32, "token_budget": 16}
    found = complete(model, tokenizer, prompts, **how)
    flat = [one for group in found for one in group]
    assert len({len(one.token_ids) for one in flat}) > 3  # rows left the batch at different times
    assert all(len(set(one.action.tolist())) == 1 for one in flat)
    assert chi_square(np.bincount([one.action[0] for one in flat], minlength=3), [1, 1, 1]) < 27.6
    assert all(len({one.action[0] for one in group}) > 1 for group in found)
    small = complete(model, tokenizer, prompts, **how, batch_rows=50)
    assert [[one.token_ids for one in group] for group in small] == [
        [one.token_ids for one in group] for group in found
    ]
