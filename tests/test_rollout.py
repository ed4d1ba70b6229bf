"""The decode loop: what `generate` would do when greedy, and exact distributions, draws and decisions when not."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM, MinPLogitsWarper, TopPLogitsWarper

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.engines.rollout import Rows, decode
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import AdapterConfigError, BudgetError, LogitsError
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.randomness import row_key, row_uniforms
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer
from hf_adaptive_decode.types import DecodeState

ACTIONS = [{"temperature": 0.0}, {"temperature": 1.25, "top_k": 10}, {"temperature": 0.7, "top_p": 0.9}]
# So many that rows end at different steps.
ENDS = {tiny.EOS, *range(10, 22)}
POLICIES = {
    "token": {"policy": "token_actions", "actions": ACTIONS, "max_prob_mask": 0.5},
    "sequence": {"policy": "sequence_actions", "actions": ACTIONS, "pooling": "mean", "action_temperature": 20.0},
    "mixture": {"policy": "static", "actions": ACTIONS, "action_weights": [1.0, 2.0, 1.0]},
    "heads": {"policy": "heads"},
}


def prompts_of(*lengths, seed=0):
    return [tiny.prompts(1, length, seed=seed + index)[0].tolist() for index, length in enumerate(lengths)]


PROMPTS = prompts_of(3, 9, 6, 14)


def rows_of(prompts, per=1, budget=12, samples=1, seed=0):
    """`per` rows of each prompt; `budget` is one for all or one a row."""
    prompt = torch.arange(len(prompts)).repeat_interleave(per)
    budget = torch.as_tensor(budget).expand(len(prompt)).clone()
    keys = [row_key(seed, index, sample) for index in range(len(prompts)) for sample in range(per)]
    return Rows(prompts, prompt, budget, torch.full(prompt.shape, samples), torch.tensor(keys))


def policy_of(base, **settings):
    """A policy on `base` whose choices differ strongly from row to row."""
    model = tiny.wrap(base, **settings)
    policy = model.decoding_adapter.eval()
    if settings["policy"] == "heads":
        tiny.randomise_heads(model)
    elif settings["policy"] != "static":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            weight = policy.layers[-1].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 3)
    return policy


def static(*actions, **settings):
    return build_policy(AutoDecoConfig(policy="static", actions=list(actions), **settings)).eval()


GREEDY = static({"temperature": 0.0})


def decoded_rows(found):
    return [row[:length].tolist() for row, length in zip(found.tokens, found.lengths.tolist(), strict=True)]


def generated(model, prompt, budget, ends=(), **settings):
    """New tokens of `generate` for one prompt alone, without padding."""
    settings = {"do_sample": False, "eos_token_id": sorted(ends) or None, "pad_token_id": 0, **settings}
    return model.generate(torch.tensor([prompt]), max_new_tokens=budget, **settings)[0, len(prompt) :].tolist()


def until_end(tokens, ends):
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]


def assert_same(one, other):
    """Two decodings agree in all that they hold."""
    width = max(one.tokens.shape[1], other.tokens.shape[1])
    assert one.tokens.shape[1] == other.tokens.shape[1] == width
    for name in ("tokens", "lengths", "ended", "temperature", "top_p", "action"):
        values = [vars(found)[name] for found in (one, other)]
        assert (values[0] is None) == (values[1] is None)
        if values[0] is not None:
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (one.decisions is None) == (other.decisions is None)
    if one.decisions is not None:
        for name in ("action", "row", "step"):
            assert torch.equal(vars(one.decisions)[name], vars(other.decisions)[name])
        for name in ("context", "remaining_tokens", "parallel_samples"):
            values = [vars(found.decisions.seen)[name] for found in (one, other)]
            torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


# --- greedy, as generate ----------------------------------------------------------------------------------------------


def test_greedy_rows_are_what_generate_gives(family):
    base = tiny.build_base(family)
    found = decode(base, GREEDY, rows_of(PROMPTS, per=2), ends=ENDS, pad=0)
    ids, mask = tiny.left_padded(list(map(torch.tensor, PROMPTS)))
    how = {"do_sample": False, "eos_token_id": sorted(ENDS), "pad_token_id": 0}
    batch = base.generate(ids, attention_mask=mask, max_new_tokens=12, **how)[:, ids.shape[1] :].tolist()
    rows = decoded_rows(found)
    for index, prompt in enumerate(PROMPTS):
        alone = generated(base, prompt, 12, ENDS)
        assert rows[2 * index] == rows[2 * index + 1] == alone == until_end(batch[index], ENDS)
        assert found.ended[2 * index] == (alone[-1] in ENDS)
    assert (found.tokens >= 0).sum(1).tolist() == found.lengths.tolist() == list(map(len, rows))
    assert found.temperature is found.action is found.decisions is None


def test_each_row_keeps_to_its_own_budget(family):
    base = tiny.build_base(family)
    budgets = [1, 12, 3, 7, 12, 2, 5, 9]
    found = decode(base, GREEDY, rows_of(PROMPTS, per=2, budget=budgets), ends=set(), pad=0)
    for row, budget in enumerate(budgets):
        assert decoded_rows(found)[row] == generated(base, PROMPTS[row // 2], budget)
    assert found.lengths.tolist() == budgets
    assert not found.ended.any()


def test_a_row_that_ends_on_its_last_token_has_ended(base):
    alone = generated(base, PROMPTS[1], 5)
    found = decode(base, GREEDY, rows_of(PROMPTS[1:2], budget=5), ends={alone[-1]} - set(alone[:-1]), pad=0)
    assert found.lengths.tolist() == [5]
    assert found.ended.all() == (alone[-1] not in alone[:-1])


CONSTRAINTS = [
    {"repetition_penalty": 1.8},
    {"suppress_tokens": list(range(3, 40))},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 8},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"bad_words_ids": [[5], [6, 7]]},
    {"sequence_bias": [[[7], 5.0]]},
    {"exponential_decay_length_penalty": (3, 2.0)},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda one: next(iter(one)))
def test_the_bases_own_constraints_act_as_in_generate(constraint, family):
    base = tiny.build_base(family)
    ends = set(range(2, 50))
    (name,) = constraint
    setattr(base.generation_config, name, constraint[name])
    base.generation_config.eos_token_id = sorted(ends)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(base, GREEDY, rows_of(PROMPTS, per=2), ends=ends, pad=0)
    for index, prompt in enumerate(PROMPTS):
        assert decoded_rows(found)[2 * index] == generated(base, prompt, 12, ends)


def test_constraints_follow_the_rows_that_are_left(base):
    base.generation_config.repetition_penalty = 1.5
    budgets = [2, 12, 4, 12, 1, 6, 12, 3]
    found = decode(base, GREEDY, rows_of(PROMPTS, per=2, budget=budgets), ends=set(), pad=0)
    for row, budget in enumerate(budgets):
        assert decoded_rows(found)[row] == generated(base, PROMPTS[row // 2], budget)


def test_a_row_may_reach_the_last_position_while_others_go_on():
    # Positions of a row that has ended must not run past the model's table, whether or not it has been dropped.
    base = tiny.build_base("gpt2")
    prompts = prompts_of(250, *[4] * 19)
    found = decode(base, GREEDY, rows_of(prompts, budget=[6] + [30] * 19), ends=set(), pad=0)
    assert decoded_rows(found)[0] == generated(base, prompts[0], 6)
    assert decoded_rows(found)[7] == generated(base, prompts[7], 30)


def build_mamba():
    torch.manual_seed(0)
    shape = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(**shape, initializer_range=0.5, pad_token_id=0, eos_token_id=tiny.EOS)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(tiny.LOGIT_STD / model(tiny.prompts(4, 12)).logits.std())
    return model


def test_a_model_without_a_key_value_cache_decodes_as_in_generate():
    model = build_mamba()
    budgets = [8, 2, 8, 5, 8, 8, 1, 3]
    found = decode(model, GREEDY, rows_of(PROMPTS, per=2, budget=budgets), ends=ENDS, pad=0)
    for row, budget in enumerate(budgets):
        assert decoded_rows(found)[row] == generated(model, PROMPTS[row // 2], budget, ENDS)


def test_a_model_without_a_key_value_cache_samples_alike_with_and_without_dropping():
    model = build_mamba()
    policy = policy_of(model, **POLICIES["token"])
    rows = rows_of(PROMPTS, per=3, budget=[1, 4, 8] * 4)
    assert_same(*(decode(model, policy, rows, ends=ENDS, pad=0, drops_ended=d, records="decisions") for d in (1, 0)))


def test_the_adaptive_model_decodes_with_its_own_adapter_or_another():
    base = tiny.build_base()
    expected = decode(base, GREEDY, rows_of(PROMPTS), ends=ENDS, pad=0)
    model = tiny.make_heads_identity(tiny.wrap(tiny.build_base()))
    assert_same(decode(model, GREEDY, rows_of(PROMPTS), ends=ENDS, pad=0), expected)
    plain = decode(base, static({"temperature": 1.0}), rows_of(PROMPTS), ends=ENDS, pad=0)
    assert_same(decode(model, model.decoding_adapter.eval(), rows_of(PROMPTS), ends=ENDS, pad=0), plain)


def test_nothing_is_left_on_the_model(base):
    decode(base, GREEDY, rows_of(PROMPTS), ends=ENDS, pad=0)
    assert tiny.hooks_left(base) == 0


# --- dropping rows ----------------------------------------------------------------------------------------------------


def both_ways(base, policy, rows, records):
    return [decode(base, policy, rows, ends=ENDS, pad=0, records=records, drops_ended=drops) for drops in (True, False)]


@pytest.mark.parametrize("records", ["parameters", "decisions"])
def test_dropping_ended_rows_changes_nothing(family, records):
    base = tiny.build_base(family)
    policy = policy_of(base, **POLICIES["token"])
    rows = rows_of(prompts_of(5, 11, 2, 17, 8), per=4, budget=[3, 20, 1, 9] * 5, samples=4)
    assert_same(*both_ways(base, policy, rows, records))


@pytest.mark.parametrize("name", POLICIES)
@examples(max_examples=6)
@given(data=st.data())
def test_dropping_ended_rows_changes_nothing_for_any_rows(name, data):
    base = tiny.build_base()
    policy = policy_of(base, **POLICIES[name])
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    per = data.draw(st.integers(1, 4))
    budgets = data.draw(st.lists(st.integers(1, 16), min_size=per * len(lengths), max_size=per * len(lengths)))
    rows = rows_of(prompts_of(*lengths), per=per, budget=budgets, samples=per, seed=data.draw(st.integers(0, 99)))
    one, other = both_ways(base, policy, rows, "parameters")
    assert_same(one, other)
    assert (one.lengths <= rows.token_budget).all()
    assert (one.ended | (one.lengths == rows.token_budget)).all()
    after = torch.arange(one.tokens.shape[1]) >= one.lengths[:, None]
    assert (one.tokens[after] == -1).all()
    assert one.temperature.isnan().equal(after)
    assert one.top_p.isnan().equal(after)
    assert_same(*both_ways(base, policy, rows, "decisions"))


def test_dropping_saves_the_models_work(base):
    seen = []
    handle = base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=1
    )
    decode(base, GREEDY, rows_of(PROMPTS, budget=[2, 4, 6, 8]), ends=set(), pad=0)
    handle.remove()
    assert seen == [4, 4, 3, 3, 2, 2, 1, 1]


def test_a_prompt_is_read_once_whatever_its_rows(base):
    seen = []
    handle = base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=1
    )
    decode(base, GREEDY, rows_of(PROMPTS[:2], per=5, budget=2), ends=set(), pad=0)
    handle.remove()
    assert seen == [2, 10]


# --- draws that belong to a row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_does_not_depend_on_the_other_rows_or_their_order(base, name):
    policy = policy_of(base, **POLICIES[name])
    rows = rows_of(PROMPTS, per=3, budget=[4, 12, 9] * 4, samples=3)
    how = {"ends": ENDS, "pad": 0, "records": "parameters"}
    whole = decode(base, policy, rows, **how)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = decode(base, policy, rows.select(order), **how)
    assert [decoded_rows(shuffled)[place] for place in order.argsort().tolist()] == decoded_rows(whole)
    for row in (1, 7):
        alone = decode(base, policy, rows.select(torch.tensor([row])), **how)
        assert decoded_rows(alone) == [decoded_rows(whole)[row]]
        length = int(whole.lengths[row])
        torch.testing.assert_close(alone.temperature[0], whole.temperature[row, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constraint", [{}, {"repetition_penalty": 1.8}, {"min_new_tokens": 8}], ids=str)
def test_a_prompt_does_not_feel_how_long_the_others_are(base, constraint):
    for name, value in constraint.items():
        setattr(base.generation_config, name, value)
    base.generation_config.eos_token_id = sorted(ENDS)
    # Token 0 pads, and a padded row must be as free to use it as any other.
    base.generation_config.sequence_bias = [[[0], 4.0]]
    policy, rows = static({"temperature": 1.5}), rows_of([PROMPTS[0], prompts_of(40)[0]], per=8)
    first = rows.select(torch.arange(8))
    alone = rows_of(PROMPTS[:1], per=8)
    assert torch.equal(first.keys, alone.keys)
    found = [decode(base, policy, one, ends=ENDS, pad=0) for one in (first, alone)]
    assert decoded_rows(found[0]) == decoded_rows(found[1])
    assert (found[1].tokens == 0).any()


@pytest.fixture(scope="module")
def testbed():
    prompts = [row["prompt"] for row in build_problems("validation", 10)]
    return load_base_model(), load_tokenizer(), prompts


def ids_of(groups):
    return [[one.token_ids for one in group] for group in groups]


def test_completions_do_not_depend_on_the_batch_size(testbed):
    model, tokenizer, prompts = testbed
    budgets = [5 + 3 * index for index in range(len(prompts))]
    how = {"samples": 3, "token_budget": budgets}
    found = [complete(model, tokenizer, prompts, batch_rows=rows, **how) for rows in (4, 16, 1000)]
    assert ids_of(found[0]) == ids_of(found[1]) == ids_of(found[2])
    assert all(len(one.token_ids) <= budget for group, budget in zip(found[0], budgets, strict=True) for one in group)
    assert ids_of(complete(model, tokenizer, prompts[:4], samples=3, token_budget=budgets[:4])) == ids_of(found[0][:4])


def test_no_more_rows_are_decoded_at_once_than_asked(testbed):
    model, tokenizer, prompts = testbed
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    complete(model, tokenizer, prompts[:2], samples=6, token_budget=3, batch_rows=4)
    handle.remove()
    assert max(seen) <= 4


def test_torchs_generator_is_neither_read_nor_moved(testbed):
    model, tokenizer, prompts = testbed
    how = {"samples": 3, "token_budget": 12, "settings": {"temperature": 1.2, "top_p": 0.95}}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = complete(model, tokenizer, prompts, **how)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert ids_of(complete(model, tokenizer, prompts, **how)) == ids_of(first)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_reads_torchs_generator(base, name):
    policy = policy_of(base, **POLICIES[name])
    before = torch.get_rng_state()
    decode(base, policy, rows_of(PROMPTS, per=2), ends=ENDS, pad=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ_and_repeat(testbed):
    model, tokenizer, prompts = testbed
    first, again, other = (
        ids_of(complete(model, tokenizer, prompts, samples=3, token_budget=12, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({tuple(group[0]) for group in first}) > 1
    assert any(len(set(group)) > 1 for group in first)


def test_a_number_from_numpy_seeds_as_pythons_own_does(testbed):
    model, tokenizer, prompts = testbed
    found = [complete(model, tokenizer, prompts, token_budget=12, seed=seed) for seed in (3, np.int64(3))]
    assert ids_of(found[0]) == ids_of(found[1])


# --- the distributions ------------------------------------------------------------------------------------------------

DRAWS = 20_000


def assert_drawn_from(probabilities, drawn):
    """A chi-square test at 5 standard deviations (Wilson-Hilferty): a false alarm in 1 of 3 million runs."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities.double() * len(drawn)
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum().clamp(min=1e-9)[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    if expected[-1] < 5:  # too rare a remainder for the approximation
        assert counts[-1] < 5 + 5 * 5**0.5
        expected, counts = expected[:-1], counts[:-1]
    freedom = max(len(expected) - 1, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 5


def warped(logits, action):
    """The distribution of one action by transformers' own warpers."""
    scores = logits / action.get("temperature", 1.0)
    if "top_p" in action:
        scores = TopPLogitsWarper(action["top_p"])(None, scores)
    if "min_p" in action:
        scores = MinPLogitsWarper(action["min_p"])(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("actions", "weights"),
    [
        ([{"temperature": 1.0}], None),
        ([{"temperature": 1.4, "top_p": 0.8}], None),
        ([{"temperature": 0.8, "top_p": 0.7}, {"temperature": 2.0}, {"min_p": 0.2}], [0.5, 0.2, 0.3]),
    ],
    ids=["plain", "top-p", "mixture"],
)
def test_tokens_are_drawn_from_the_warped_distribution(base, actions, weights):
    policy = static(*actions, **({"action_weights": weights} if weights else {}))
    found = decode(base, policy, rows_of(PROMPTS[:1], per=DRAWS, budget=1), ends=set(), pad=0, records="parameters")
    logits = tiny.hidden_and_logits(base, torch.tensor(PROMPTS[:1]))[1][:, -1]
    weights = weights or [1.0]
    assert_drawn_from(sum(w * warped(logits, a) for w, a in zip(weights, actions, strict=True)), found.tokens[:, 0])
    for number, action in enumerate(actions):
        # What was drawn with an action has that action's distribution, not the mixture's.
        assert_drawn_from(warped(logits, action), found.tokens[found.action[:, 0] == number, 0])
    assert_drawn_from(torch.tensor(weights), found.action[:, 0])


def test_the_second_token_is_drawn_given_the_first(base):
    plain = static({"temperature": 1.0})
    found = decode(base, plain, rows_of(PROMPTS[:1], per=DRAWS, budget=2), ends=set(), pad=0)
    first = int(found.tokens[:, 0].bincount().argmax())
    logits = tiny.hidden_and_logits(base, torch.tensor([[*PROMPTS[0], first]]))[1][:, -1]
    assert_drawn_from(logits.softmax(-1)[0], found.tokens[found.tokens[:, 0] == first, 1])


def key_sets():
    hashed = torch.tensor([row_key(0, index // 8, index % 8) for index in range(DRAWS)])
    return {"hashed": hashed, "counted": torch.arange(DRAWS), "far": torch.arange(DRAWS) << 40}


@pytest.mark.parametrize("kind", ["hashed", "counted", "far"])
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (0, 1), (1, 0), (700, 1)])
def test_row_numbers_are_uniform(kind, step, stream):
    uniform = row_uniforms(key_sets()[kind], step, stream)
    assert uniform.dtype == torch.float64
    assert ((uniform >= 0) & (uniform < 1)).all()
    # Five standard deviations of the mean: a false alarm in 1.7 million runs.
    assert abs(float(uniform.mean()) - 0.5) < 5 / (12 * DRAWS) ** 0.5
    # Kolmogorov-Smirnov: 2·exp(−2·2.7²), a false alarm in 1 million runs.
    ranks = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
    ordered = uniform.sort().values
    distance = torch.maximum(ranks[1:] - ordered, ordered - ranks[:-1]).max()
    assert float(distance) * DRAWS**0.5 < 2.7
    # The low bits, of which a distribution function sees nothing.
    low = ((uniform * 2**53).long() & 15).bincount(minlength=16)
    assert_drawn_from(torch.full((16,), 1 / 16), torch.arange(16).repeat_interleave(low))


@pytest.mark.parametrize("kind", ["hashed", "counted", "far"])
def test_steps_streams_and_neighbours_are_independent(kind):
    keys = key_sets()[kind]
    numbers = torch.stack([row_uniforms(keys, step, stream) for step in (0, 1, 2, 16) for stream in (0, 1)])
    pairs = [(one, other) for index, one in enumerate(numbers) for other in numbers[:index]]
    pairs += [(one[:-1], one[1:]) for one in numbers]
    for one, other in pairs:
        # 36 tests at five standard deviations: a false alarm in 48,000 runs, and the keys are fixed.
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / DRAWS**0.5
        cells = (one * 8).long() * 8 + (other * 8).long()
        assert_drawn_from(torch.full((64,), 1 / 64), cells)


def test_keys_are_the_same_in_every_process_and_tell_rows_apart():
    assert row_key(0, "prompt", 3) == 1923459994014481171
    names = [(seed, index, sample) for seed in range(10) for index in range(30) for sample in range(10)]
    keys = {row_key(*name) for name in names}
    assert len(keys) == len(names)
    assert all(0 <= key < 2**63 for key in keys)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drops_ended", [True, False])
def test_decisions_are_those_that_the_policy_made_itself(family, drops_ended):
    base = tiny.build_base(family)
    limit = 0.4
    policy = policy_of(base, **{**POLICIES["token"], "max_prob_mask": limit})
    budgets = [2, 14, 7] * 4
    rows = rows_of(PROMPTS, per=3, budget=budgets, samples=5)
    how = {"ends": ENDS, "pad": 0, "drops_ended": drops_ended}
    found = decode(base, policy, rows, records="decisions", **how)
    expected, contexts = [], []
    for row, tokens in enumerate(decoded_rows(found)):
        prompt = PROMPTS[row // 3]
        hidden, logits = tiny.hidden_and_logits(base, torch.tensor([prompt + tokens]))
        sure = logits[0].float().softmax(-1).amax(-1) > limit
        for step in range(len(tokens)):
            at = len(prompt) - 1 + step
            if not sure[at]:
                expected.append((step, row, budgets[row] - step, 5))
                contexts.append(hidden[0, at])
    order = sorted(range(len(expected)), key=expected.__getitem__)
    made = found.decisions
    columns = (made.step, made.row, made.seen.remaining_tokens, made.seen.parallel_samples)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == [expected[index] for index in order]
    assert 0 < len(expected) < int(found.lengths.sum())
    torch.testing.assert_close(
        made.seen.context, torch.stack([contexts[index] for index in order]), rtol=1e-3, atol=1e-4
    )

    recorded = decode(base, policy, rows, records="parameters", **how)
    assert torch.equal(recorded.tokens, found.tokens)
    assert torch.equal(recorded.action[made.row, made.step], made.action)
    assert int((recorded.action >= 0).sum()) == len(made.action)
    table = torch.tensor([action["temperature"] for action in ACTIONS])
    torch.testing.assert_close(recorded.temperature[made.row, made.step], table[made.action])
    masked = (recorded.action < 0) & (recorded.tokens >= 0)
    assert (recorded.temperature[masked] == 0).all()
    assert torch.equal(decode(base, policy, rows, **how).tokens, found.tokens)


def test_actions_are_drawn_with_the_policys_probabilities(base):
    policy = policy_of(base, **{**POLICIES["token"], "max_prob_mask": None, "action_temperature": 20.0})
    rows = rows_of(PROMPTS[:1], per=DRAWS, budget=1)
    made = decode(base, policy, rows, ends=set(), pad=0, records="decisions").decisions
    with torch.no_grad():
        wanted = policy.action_logits(made.seen.select(torch.arange(1))).softmax(-1)[0]
    assert wanted.min() > 0.01
    assert_drawn_from(wanted, made.action)


def test_an_action_and_its_token_are_drawn_independently(base):
    # Equal actions: which is drawn must then say nothing of the token.
    policy = static({"temperature": 1.0}, {"temperature": 1.0})
    found = decode(base, policy, rows_of(PROMPTS[:1], per=DRAWS, budget=1), ends=set(), pad=0, records="parameters")
    wanted = tiny.hidden_and_logits(base, torch.tensor(PROMPTS[:1]))[1][0, -1].softmax(-1)
    for action in (0, 1):
        assert_drawn_from(wanted, found.tokens[found.action[:, 0] == action, 0])


def test_policies_without_actions_make_no_decisions(base):
    for name in ("heads", "mixture"):
        policy = policy_of(base, **POLICIES[name])
        assert decode(base, policy, rows_of(PROMPTS), ends=ENDS, pad=0, records="decisions").decisions is None
        base = tiny.build_base()
    trace = decode(base, policy_of(base, policy="heads"), rows_of(PROMPTS), ends=ENDS, pad=0, records="parameters")
    assert trace.action is None
    assert ((trace.temperature > 0) & (trace.temperature < 2)).sum() == trace.lengths.sum()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_sequence_policy_decides_once_from_the_prompt(family, pooling):
    base = tiny.build_base(family)
    policy = policy_of(base, **{**POLICIES["sequence"], "pooling": pooling})
    rows = rows_of(PROMPTS, per=3, budget=[2, 12, 7] * 4, samples=3)
    made = decode(base, policy, rows, ends=ENDS, pad=0, records="decisions").decisions
    assert made.row.tolist() == list(range(12))
    assert (made.step == 0).all()
    assert (made.seen.parallel_samples == 3).all()
    for index, prompt in enumerate(PROMPTS):
        hidden = tiny.hidden_and_logits(base, torch.tensor([prompt]))[0][0].float()
        wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(
            made.seen.context[3 * index : 3 * index + 3], wanted.expand(3, -1), rtol=1e-3, atol=1e-4
        )
    trace = decode(base, policy, rows, ends=ENDS, pad=0, records="parameters").action
    live = trace >= 0
    assert (trace == made.action[:, None])[live].all()
    assert len(made.action.unique()) > 1


def test_pooling_leaves_the_tokens_as_they_are(family):
    base = tiny.build_base(family)
    policy = tiny.wrap(base, policy="sequence_actions", actions=[{"temperature": 0.0}], pooling="mean")
    found = decode(base, policy.decoding_adapter.eval(), rows_of(PROMPTS, per=2, budget=8), ends=ENDS, pad=0)
    for index, prompt in enumerate(PROMPTS):
        assert decoded_rows(found)[2 * index] == generated(tiny.build_base(family), prompt, 8, ENDS)


def test_a_masked_static_is_greedy_where_the_base_is_sure(base):
    limit = 0.3
    policy = static({"temperature": 1.5, "top_k": 20}, max_prob_mask=limit)
    found = decode(base, policy, rows_of(PROMPTS, per=4), ends=ENDS, pad=0, records="parameters")
    masked = 0
    for row, tokens in enumerate(decoded_rows(found)):
        prompt = PROMPTS[row // 4]
        logits = tiny.hidden_and_logits(base, torch.tensor([prompt + tokens]))[1][0, len(prompt) - 1 : -1]
        sure = logits.softmax(-1).amax(-1) > limit
        assert found.action[row, : len(tokens)].tolist() == torch.where(sure, -1, 0).tolist()
        assert found.temperature[row, : len(tokens)].tolist() == torch.where(sure, 0.0, 1.5).tolist()
        assert (logits.argmax(-1) == torch.tensor(tokens))[sure].all()
        masked += int(sure.sum())
    assert 0 < masked < int(found.lengths.sum())


# --- priors -----------------------------------------------------------------------------------------------------------

PRIOR = [
    {"samples": 16, "probabilities": [0.1, 0.7, 0.2]},  # in any order
    {"samples": 1, "probabilities": [6, 1, 3]},
    {"samples": 4, "probabilities": [0.2, 0.2, 0.6]},
]


def with_prior(policy="token_actions", **settings):
    settings = {"actions": ACTIONS, "hidden_size": 16, "action_prior": PRIOR, **settings}
    return build_policy(AutoDecoConfig(policy=policy, **settings)).eval()


def state(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = len(samples)
    hidden, logits = torch.randn(rows, 16, generator=generator), torch.randn(rows, 50, generator=generator)
    return DecodeState(hidden, logits, torch.full((rows,), 10), torch.tensor(samples))


def odds(policy, samples):
    with torch.no_grad():
        return policy.action_logits(policy.observe(state(samples))).softmax(-1)


@pytest.mark.parametrize("policy", ["token_actions", "sequence_actions"])
def test_a_fresh_policy_draws_as_its_prior_says(policy):
    found = odds(with_prior(policy), [1, 4, 16, 4])
    wanted = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(found, wanted)


def test_a_prior_interpolates_in_log_b_and_is_constant_beyond_what_it_lists():
    policy = with_prior()
    low, middle, high = odds(policy, [1, 2, 4]).log()
    # Halfway from 1 to 4 in log B is 2; what is interpolated is the log-probability, up to normalising.
    torch.testing.assert_close(middle.softmax(-1), ((low + high) / 2).softmax(-1))
    three = torch.tensor(3.0).log() / torch.tensor(4.0).log()
    torch.testing.assert_close(odds(policy, [3])[0], ((1 - three) * low + three * high).softmax(-1))
    torch.testing.assert_close(odds(policy, [17, 1000, 16])[:2], odds(policy, [16, 16]))
    (one,) = (entry for entry in PRIOR if entry["samples"] == 4)
    torch.testing.assert_close(
        odds(with_prior(action_prior=[one]), [1, 4, 64]), torch.tensor([[0.2, 0.2, 0.6]]).expand(3, -1)
    )


def test_an_action_that_the_prior_rules_out_can_still_be_learned():
    found = odds(with_prior(action_prior=[{"samples": 1, "probabilities": [0, 1, 1]}]), [1])[0]
    assert 0 < found[0] < 1e-3


def test_actions_are_drawn_as_the_prior_says_for_the_rows_budget(base):
    policy = tiny.wrap(base, policy="token_actions", actions=ACTIONS, action_prior=PRIOR).decoding_adapter.eval()
    for entry in PRIOR:
        rows = rows_of(PROMPTS[:1], per=DRAWS, budget=1, samples=entry["samples"])
        made = decode(base, policy, rows, ends=set(), pad=0, records="decisions").decisions
        weights = torch.tensor(entry["probabilities"], dtype=torch.float64)
        assert_drawn_from(weights / weights.sum(), made.action)


def test_sure_tokens_take_the_priors_favourite_at_their_budget():
    policy = with_prior(masked_steps="prior", max_prob_mask=0.95)
    one = state([1, 4, 16, 3])
    one.logits[:, 7] = 40.0
    found = policy(one)
    assert found.action.tolist() == [-1] * 4
    favourites = [0, 2, 1, 2]
    assert found.temperature.tolist() == pytest.approx([ACTIONS[action]["temperature"] for action in favourites])
    assert found.top_k.tolist() == [ACTIONS[action].get("top_k", 0) for action in favourites]


def test_masked_steps_are_sampled_by_the_prior_and_decide_nothing(base):
    settings = {**POLICIES["token"], "max_prob_mask": 0.3, "action_prior": PRIOR, "masked_steps": "prior"}
    policy = policy_of(base, **settings)
    rows = rows_of(PROMPTS, per=4, samples=16)
    found = decode(base, policy, rows, ends=ENDS, pad=0, records="parameters")
    masked = (found.action < 0) & (found.tokens >= 0)
    assert masked.any()
    assert (found.temperature[masked] == ACTIONS[1]["temperature"]).all()
    made = decode(base, policy, rows, ends=ENDS, pad=0, records="decisions").decisions
    assert len(made.action) == int((found.action >= 0).sum())


def entry(samples=1, probabilities=(1, 1, 1), **more):
    return {"samples": samples, "probabilities": list(probabilities), **more}


@pytest.mark.parametrize(
    "prior",
    [
        "abc",
        {"samples": 1, "probabilities": [1, 1, 1]},
        [],
        [entry(samples=1 + index) for index in range(65)],
        [[1, 1, 1]],
        [{"samples": 1}],
        [entry(more=1)],
        [entry(probabilities=[1, 1])],
        [entry(probabilities=[1, 1, -0.1])],
        [entry(probabilities=[0, 0, 0])],
        [entry(probabilities=[1, 1, float("nan")])],
        [entry(probabilities=[1, 1, float("inf")])],
        [entry(probabilities=[1, 1, "1"])],
        [{"samples": 1, "probabilities": "abc"}],
        [entry(samples=0)],
        [entry(samples=1.5)],
        [entry(samples=True)],
        [entry(samples=2), entry(samples=2)],
    ],
    ids=lambda prior: str(prior)[:50],
)
def test_bad_priors_are_refused_and_named(prior):
    with pytest.raises(AdapterConfigError, match="action_prior"):
        AutoDecoConfig(policy="token_actions", actions=ACTIONS, action_prior=prior)


@pytest.mark.parametrize(
    "bad",
    [
        {"pooling": "max"},
        {"pooling": None},
        {"pooling": "mean"},
        {"masked_steps": "random"},
        {"masked_steps": ["greedy"]},
        {"masked_steps": "prior"},
    ],
    ids=str,
)
def test_bad_pooling_and_masked_steps_are_refused_and_named(bad):
    (name,) = bad
    with pytest.raises(AdapterConfigError, match=name):
        AutoDecoConfig(policy="token_actions", actions=ACTIONS, **bad)


def test_the_new_settings_survive_saving(tmp_path):
    token = {"policy": "token_actions", "action_prior": PRIOR, "masked_steps": "prior", "max_prob_mask": 0.9}
    sequence = {"policy": "sequence_actions", "action_prior": PRIOR, "pooling": "mean"}
    for settings in (token, sequence):
        config = AutoDecoConfig(actions=ACTIONS, **settings)
        config.save_pretrained(tmp_path / "config")
        loaded = AutoDecoConfig.from_pretrained(tmp_path / "config")
        assert all(vars(loaded)[name] == value for name, value in settings.items())


def test_a_saved_policy_keeps_its_prior(tmp_path):
    tiny.build_base().save_pretrained(tmp_path / "base")
    settings = AutoDecoConfig(policy="token_actions", actions=ACTIONS, action_prior=PRIOR)
    model = AutoDecoForCausalLM.from_base(tmp_path / "base", settings)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter")
    rows = rows_of(PROMPTS, per=4, samples=4)
    how = {"ends": ENDS, "pad": 0, "records": "decisions"}
    one, other = (decode(m, m.decoding_adapter, rows, **how) for m in (model, loaded))
    assert_same(one, other)


# --- errors and warnings ----------------------------------------------------------------------------------------------


def poisoned(row, step, others):
    """A base that breaks down in `row`'s prompt, once it has read its greedy token of `step`, and in no other's."""
    base = tiny.build_base()
    found = decoded_rows(decode(base, GREEDY, rows_of(PROMPTS, budget=12), ends=set(), pad=0))
    token = found[row][step]
    shared = set(found[row][:step]).union(*PROMPTS, *(found[index] for index in others))
    assert token not in shared
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = float("nan")
    return base


def test_broken_logits_name_their_step_and_row():
    base = tiny.build_base()
    with torch.no_grad():
        base.get_input_embeddings().weight[95] = float("nan")
    prompts = [[5, 6, 7], [8, 9], [11, 12, 95], [13]]
    with pytest.raises(LogitsError, match=r"step 0, row 2\b.*NaN"):
        decode(base, GREEDY, rows_of(prompts), ends=set(), pad=0)
    with pytest.raises(LogitsError, match=r"step 0, row 4\b.*NaN"):
        decode(base, GREEDY, rows_of(prompts, per=2), ends=set(), pad=0)
    assert tiny.hooks_left(base) == 0


def test_broken_logits_name_the_row_as_the_caller_counts_them():
    # Rows 0 and 1 have left the batch by then.
    base = poisoned(3, 3, others=[])
    with pytest.raises(LogitsError, match=r"step 4, row 3\b"):
        decode(base, GREEDY, rows_of(PROMPTS, budget=[1, 2, 1, 12]), ends=set(), pad=0)


@pytest.mark.parametrize("drops_ended", [True, False])
def test_what_happens_after_a_rows_end_is_no_error(drops_ended):
    base = poisoned(3, 3, others=[0])
    rows = rows_of(PROMPTS, budget=[12, 1, 1, 4])
    found = decode(base, GREEDY, rows, ends=set(), pad=0, drops_ended=drops_ended)
    assert found.lengths.tolist() == [12, 1, 1, 4]


@torch.no_grad()
def test_a_policy_that_breaks_down_is_named_by_step_and_row(base):
    policy = policy_of(base, policy="heads")
    policy.temperature_head.out.bias.fill_(float("nan"))
    with pytest.raises(LogitsError, match=r"step 0, row 0\b.*temperature"):
        decode(base, policy, rows_of(PROMPTS), ends=ENDS, pad=0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "8", None, True, [4], [4, 0], [4, 4, 4], [4, 2.5], 1 << 40], ids=str)
def test_bad_token_budgets_are_refused(testbed, bad):
    model, tokenizer, prompts = testbed
    with pytest.raises(BudgetError):
        complete(model, tokenizer, prompts[:2], token_budget=bad)


@pytest.mark.parametrize("name", ["samples", "parallel_budget"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, "8", True], ids=str)
def test_bad_parallel_budgets_are_refused(testbed, name, bad):
    model, tokenizer, prompts = testbed
    with pytest.raises(BudgetError):
        complete(model, tokenizer, prompts[:2], token_budget=2, **{name: bad})


def test_no_prompts_give_no_completions(testbed):
    model, tokenizer, _ = testbed
    assert complete(model, tokenizer, []) == []


def test_the_parallel_budget_that_the_policy_is_told_is_the_samples_by_default(testbed):
    _, tokenizer, prompts = testbed
    model = tiny.wrap(load_base_model(), policy="sequence_actions", actions=ACTIONS)
    seen = []
    model.decoding_adapter.budget_encoder.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].parallel_samples.tolist())
    )
    complete(model, tokenizer, prompts[:2], samples=3, token_budget=2)
    complete(model, tokenizer, prompts[:2], samples=3, token_budget=2, parallel_budget=32)
    assert seen == [[3] * 6, [32] * 6]


def test_completions_leave_the_policy_in_its_mode(testbed):
    _, tokenizer, prompts = testbed
    model = tiny.wrap(load_base_model(), policy="token_actions", actions=ACTIONS, policy_dropout=0.9)
    model.decoding_adapter.train()
    found = [ids_of(complete(model, tokenizer, prompts, samples=2, token_budget=8)) for _ in range(2)]
    assert found[0] == found[1]
    assert model.decoding_adapter.training


def test_a_budget_beyond_the_policys_largest_warns_once(base):
    policy = policy_of(base, **{**POLICIES["token"], "max_token_budget": 8})
    rows = rows_of(PROMPTS, budget=[2, 9, 4, 8])
    with pytest.warns(UserWarning, match="9 tokens.*largest, 8"):
        decode(base, policy, rows, ends=ENDS, pad=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(base, policy, rows, ends=ENDS, pad=0)
        within = policy_of(tiny.build_base(), **{**POLICIES["token"], "max_token_budget": 9})
        decode(base, within, rows, ends=ENDS, pad=0)
