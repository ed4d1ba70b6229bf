"""Policies over finite actions: what they see of the budget, how they draw, and how `generate` uses them."""

import warnings

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM, Budget
from hf_adaptive_decode.actions import ACTION_PRESETS
from hf_adaptive_decode.errors import (
    AdapterConfigError,
    AdaptiveDecodeError,
    BudgetError,
    UnsupportedGenerationError,
)
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.policies.budget_encoder import BudgetEncoder, thermometer
from hf_adaptive_decode.types import DecodeState

ACTIONS = [{"temperature": 0.0}, {"temperature": 1.25, "top_k": 10}, {"temperature": 0.7, "top_p": 0.9}]
ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


def make(policy="token_actions", **settings):
    config = AutoDecoConfig(policy=policy, **{"actions": ACTIONS, "hidden_size": 16, **settings})
    return build_policy(config).eval()


def state(rows=6, tokens=None, samples=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, logits = torch.randn(rows, 16, generator=generator), torch.randn(rows, 50, generator=generator) * 3
    tokens = torch.full((rows,), 10) if tokens is None else torch.tensor(tokens)
    samples = torch.ones(rows, dtype=torch.long) if samples is None else torch.tensor(samples)
    return DecodeState(hidden, logits, tokens, samples)


def logits_of(policy, one):
    return policy.action_logits(policy.observe(one))


@torch.no_grad()
def randomise(policy, seed=0, scale=3.0):
    """Output weights that make the actions differ strongly from row to row."""
    generator = torch.Generator().manual_seed(seed)
    weight = policy.layers[-1].weight
    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return policy


# --- budgets ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(2, 2048))
def test_the_code_rises_with_the_budget_and_interpolates(budget, largest):
    thresholds = BudgetEncoder(["tokens"], largest, 8).get_buffer("tokens_thresholds")
    assert thresholds[0] == 1
    assert thresholds[-1] == largest
    code = thermometer(torch.tensor([budget, budget + 1]), thresholds)
    assert ((code >= 0) & (code <= 1)).all()
    assert (code[1] >= code[0]).all()
    # Full up to the budget, empty from there on, and one component in between.
    assert ((code[0] > 0) & (code[0] < 1)).sum() <= 1
    if budget < largest:
        assert code[1].sum() > code[0].sum()
    else:
        assert (code[0] == 1).all()


def test_the_encoding_is_as_loud_as_a_hidden_state():
    encoder = BudgetEncoder(["tokens", "samples"], 64, 8)
    encoding = encoder(state(tokens=[1, 5, 9, 20, 40, 64], samples=[1, 1, 2, 4, 8, 8]))
    assert encoding.std(dim=1).tolist() == pytest.approx([3.0] * 6, rel=0.1)
    assert (encoding[0] - encoding[1]).norm() > 0.5


def test_a_policy_that_knows_a_budget_insists_on_it():
    blind = DecodeState(torch.randn(2, 16))
    with pytest.raises(BudgetError, match="tokens"):
        make()(blind)
    with pytest.raises(BudgetError, match="samples"):
        make("sequence_actions")(blind)
    make(budget_features=[])(blind)


def test_the_twin_without_a_budget_differs_by_the_encoder_alone():
    told, twin = make(), make(budget_features=[])
    extra = set(dict(told.named_parameters())) - set(dict(twin.named_parameters()))
    assert extra
    assert all(name.startswith("budget_encoder.") for name in extra)
    one, other = state(tokens=[3] * 6), state(tokens=[40] * 6)
    assert torch.equal(logits_of(randomise(twin), one), logits_of(twin, other))
    assert not torch.equal(logits_of(randomise(told), one), logits_of(told, other))


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["token_actions", "sequence_actions"])
def test_a_fresh_policy_is_uniform(policy):
    assert (logits_of(make(policy), state()) == 0).all()


def test_actions_are_drawn_with_their_probabilities():
    torch.manual_seed(1)
    policy = randomise(make(action_temperature=2.0), scale=1.0)
    one = state(1)
    wanted = logits_of(policy, one).softmax(-1)[0]
    many = DecodeState(*(None if t is None else t.expand(20_000, *t.shape[1:]) for t in vars(one).values()))
    drawn = torch.bincount(policy(many).action, minlength=3) / 20_000
    # Five standard deviations of a share: a false alarm in 1 of 500,000 runs, and the seed is fixed.
    assert (drawn - wanted).abs().max() < 5 * 0.5 / 20_000**0.5
    torch.manual_seed(1)
    sharper = logits_of(randomise(make(action_temperature=0.5), scale=1.0), one)
    torch.testing.assert_close(sharper, 4 * logits_of(policy, one))


def test_a_deterministic_policy_takes_the_likeliest_action():
    policy = randomise(make(deterministic=True))
    found = policy(state())
    assert torch.equal(found.action, logits_of(policy, state()).argmax(-1))
    for row, action in enumerate(found.action.tolist()):
        assert found.temperature[row] == pytest.approx(ACTIONS[action]["temperature"])
        assert found.top_k[row] == ACTIONS[action].get("top_k", 0)
        assert found.top_p[row] == pytest.approx(ACTIONS[action].get("top_p", 1.0))


@pytest.mark.parametrize("features", [["hidden"], ["entropy"], ["statistics"], ["hidden", "statistics"]], ids="+".join)
def test_rows_depend_on_themselves_alone(features):
    policy = randomise(make(features=features))
    whole = logits_of(policy, state(8))
    alone = DecodeState(*(None if value is None else value[3:4] for value in vars(state(8)).values()))
    torch.testing.assert_close(logits_of(policy, alone), whole[3:4])


def test_entropy_alone_hides_the_hidden_state():
    policy = randomise(make(features=["entropy"]))
    one, other = state(seed=0), state(seed=1)
    mixed = DecodeState(other.hidden, one.logits, one.remaining_tokens, one.parallel_samples)
    assert torch.equal(logits_of(policy, one), logits_of(policy, mixed))


def test_sure_tokens_are_greedy_and_carry_no_action():
    policy = make(max_prob_mask=0.95, actions=[{"temperature": 1.25, "top_k": 10}])
    one = state(2)
    one.logits[0, 7] = 40.0
    one.logits[1] = 0.0
    found = policy(one)
    assert found.action.tolist() == [-1, 0]
    assert found.temperature.tolist() == [0.0, 1.25]


def test_dropout_acts_in_training_alone():
    policy = randomise(make(policy_dropout=0.5))
    assert torch.equal(logits_of(policy, state()), logits_of(policy, state()))
    policy.train()
    assert not torch.equal(logits_of(policy, state()), logits_of(policy, state()))


def test_half_precision_states_and_weights_give_fp32_logits():
    policy = randomise(make())
    half = DecodeState(state().hidden.bfloat16(), None, state().remaining_tokens)
    assert logits_of(policy, half).dtype == torch.float32
    assert logits_of(policy.bfloat16(), half).dtype == torch.float32


@pytest.mark.parametrize(
    "bad",
    [
        {"actions": None},
        {"budget_features": ["time"]},
        {"budget_features": ["tokens", "tokens"]},
        {"max_token_budget": 1},
        {"policy_dropout": 1.0},
        {"action_temperature": 0.0},
        {"max_prob_mask": 1.5},
        {"deterministic": 1},
        {"policy_hidden_size": 0},
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_named(bad):
    (name,) = bad
    with pytest.raises(AdapterConfigError, match=name):
        AutoDecoConfig(**{"policy": "token_actions", "actions": ACTIONS, **bad})


def test_a_sequence_policy_refuses_a_mask_of_tokens():
    # A sure first token would otherwise have made the whole held sequence greedy.
    with pytest.raises(AdapterConfigError, match=r"max_prob_mask.*sequence_actions"):
        AutoDecoConfig(policy="sequence_actions", actions=ACTIONS, max_prob_mask=0.95)


@pytest.mark.parametrize("preset", ACTION_PRESETS)
def test_every_preset_makes_a_policy(preset):
    found = make(actions=ACTION_PRESETS[preset])(state())
    assert found.action.max() < len(ACTION_PRESETS[preset])


# --- in generate ------------------------------------------------------------------------------------------------------


def wrapped(policy, family="qwen3", **settings):
    model = AutoDecoForCausalLM.from_base(
        tiny.build_base(family), AutoDecoConfig(policy=policy, actions=ACTIONS, **settings)
    )
    randomise(model.decoding_adapter)
    return model


def traced(model, ids, **settings):
    settings = {"return_dict_in_generate": True, "output_decoding_trace": True, **ENDLESS, **settings}
    return tiny.sample(model, ids, **settings)


def test_a_sequence_policy_decides_once_and_holds(family):
    trace = traced(
        wrapped("sequence_actions", family), tiny.prompts(4), budget=Budget(tokens=6, samples=2)
    ).decoding_trace
    assert (trace.action == trace.action[:, :1]).all()
    assert trace.action.shape == (8, 6)


def test_a_token_policy_decides_anew_at_each_step(family):
    model = wrapped("token_actions", family, budget_features=[])
    trace = traced(model, tiny.prompts(4), budget=24).decoding_trace
    assert (trace.action != trace.action[:, :1]).any()


def test_a_token_policy_counts_its_budget_down_to_the_token():
    # Greedy exactly when at most 4 tokens are left, by hand: one threshold component decides.
    model = wrapped("token_actions", deterministic=True, max_token_budget=32)
    policy = model.decoding_adapter
    seen = []
    policy.budget_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].remaining_tokens.tolist()))
    traced(model, tiny.prompts(2), budget=[4, 6])
    assert seen == [[4, 6], [3, 5], [2, 4], [1, 3], [0, 2], [0, 1]]
    seen.clear()
    traced(model, tiny.prompts(2), max_new_tokens=3)
    assert seen == [[3, 3], [2, 2], [1, 1]]


def test_the_parallel_budget_reaches_the_policy():
    model = wrapped("sequence_actions")
    seen = []
    model.decoding_adapter.budget_encoder.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].parallel_samples.tolist())
    )
    traced(model, tiny.prompts(1), budget=Budget(tokens=2, samples=3))
    traced(model, tiny.prompts(1), max_new_tokens=2)
    assert seen == [[3, 3, 3], [1]]


def test_a_budget_beyond_the_largest_warns_once_and_is_the_largest():
    model = wrapped("token_actions", max_token_budget=8)
    with pytest.warns(UserWarning, match="largest, 8"):
        model.generate(tiny.prompts(1), budget=9, **ENDLESS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(tiny.prompts(1), budget=9, **ENDLESS)
    encoder = model.decoding_adapter.budget_encoder
    assert torch.equal(encoder(state(1, tokens=[9])), encoder(state(1, tokens=[8])))


@pytest.mark.parametrize("policy", ["token_actions", "sequence_actions"])
def test_saved_policies_load_by_every_way(policy, tmp_path):
    tiny.build_base().save_pretrained(tmp_path / "base")
    mask = 0.9 if policy == "token_actions" else None
    settings = AutoDecoConfig(policy=policy, actions=ACTIONS, max_prob_mask=mask)
    model = AutoDecoForCausalLM.from_base(tmp_path / "base", settings)
    randomise(model.decoding_adapter)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected = tiny.sample(model, tiny.prompts(), budget=8, **ENDLESS)
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(tiny.sample(loaded, tiny.prompts(), budget=8, **ENDLESS), expected)

    base = tiny.build_base()
    bare = AdaptiveSamplerLogitsProcessor.from_pretrained(
        tmp_path / "adapter", base, budget=Budget(tokens=8, samples=1)
    )
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "logits_processor": [bare], **ENDLESS}
    for _ in range(2):  # a second call starts over
        assert torch.equal(tiny.sample(base, tiny.prompts(), **how), expected)


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(family):
    """A sequence policy that pools by mean, deterministic, and what it was shown at each call."""
    settings = {"policy": "sequence_actions", "pooling": "mean", "actions": ACTIONS, "deterministic": True}
    model = tiny.wrap(tiny.build_base(family), budget_features=[], **settings)
    randomise(model.decoding_adapter)
    seen = []
    observe = model.decoding_adapter.observe
    model.decoding_adapter.observe = lambda one: seen.append(observe(one)) or seen[-1]
    return model, seen


def test_generate_pools_the_prompts_real_tokens(pooled):
    model, seen = pooled
    rows = [tiny.prompts(1, 4)[0], tiny.prompts(1, 9, seed=1)[0]]
    ids, mask = tiny.left_padded(rows)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, **ENDLESS)
    assert len(seen) == 1
    for row, found in zip(rows, seen[0].context, strict=True):
        hidden, _ = tiny.hidden_and_logits(model, row[None])
        torch.testing.assert_close(found, hidden[0].float().mean(0), atol=1e-4, rtol=1e-4)


def test_generate_pools_every_sample_of_a_prompt_alike(pooled):
    model, seen = pooled
    model.generate(input_ids=tiny.prompts(2, 6), max_new_tokens=2, num_return_sequences=3, **ENDLESS)
    assert seen[0].context.shape[0] == 6
    torch.testing.assert_close(seen[0].context[0], seen[0].context[2])
    with torch.no_grad():
        before = model(input_ids=tiny.prompts(2, 6)).logits.shape
    assert before == (2, 6, tiny.VOCABULARY)  # no hook is left that would narrow it


def test_what_cannot_pool_by_mean_says_so(tmp_path):
    model = tiny.wrap(policy="sequence_actions", pooling="mean", actions=ACTIONS, budget_features=[])
    with pytest.raises(UnsupportedGenerationError, match="chunked prefill"):
        model.generate(input_ids=tiny.prompts(1, 6), max_new_tokens=2, prefill_chunk_size=2, **ENDLESS)
    model.save_pretrained(tmp_path)
    base = tiny.build_base()
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(tmp_path, base)
    with pytest.raises(AdaptiveDecodeError, match="pool"):
        base.generate(tiny.prompts(1, 6), do_sample=True, top_k=0, max_new_tokens=2, logits_processor=[processor])
