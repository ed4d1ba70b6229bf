"""Policies: their formulas against hand computations, row by row in fp32, and the settings that describe them."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_adaptive_decode import AutoDecoConfig, DecodeState, SamplingParameters
from hf_adaptive_decode.configuration import FORMAT_VERSION, MAX_CONFIG_BYTES, POLICY_NAMES, read_config
from hf_adaptive_decode.errors import AdapterConfigError, AdaptiveDecodeError
from hf_adaptive_decode.features import STATISTICS, logit_statistics
from hf_adaptive_decode.policies import POLICIES, build_policy
from hf_adaptive_decode.warping import warp_logits

WIDTH, VOCABULARY = 24, 50
GREEDY, WARM = {"temperature": 0.0}, {"temperature": 1.25, "top_k": 10}


def make_policy(seed: int = 0, output_scale: float = 0.5, **overrides):
    torch.manual_seed(seed)
    policy = build_policy(AutoDecoConfig(**{"hidden_size": WIDTH, "vocab_size": VOCABULARY, **overrides}))
    for name, parameter in policy.named_parameters():
        if name.endswith("out.weight"):
            nn.init.normal_(parameter, std=output_scale)
    return policy.eval()


def make_state(rows: int = 6, seed: int = 1, dtype=torch.float32, spread: float = 3.0) -> DecodeState:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    return DecodeState(hidden, torch.randn(rows, VOCABULARY, generator=generator) * spread)


def test_heads_follow_their_formula():
    policy, state = make_policy(), make_state(40)
    found = policy(state)
    temperature, top_p = tiny.heads_by_hand(policy, state.hidden)
    assert torch.allclose(found.temperature, temperature, atol=1e-6)
    assert torch.allclose(found.top_p, top_p, atol=1e-6)
    assert (found.top_k, found.min_p, found.action) == (None, None, None)


def test_the_hidden_layer_is_256_wide_unless_asked_otherwise():
    shapes = {name: tuple(tensor.shape) for name, tensor in make_policy().state_dict().items()}
    assert shapes["temperature_head.up.weight"] == (256, WIDTH)
    assert shapes["top_p_head.up.weight"] == (256, WIDTH + 1)
    assert shapes["top_p_head.out.weight"] == (1, 256)
    assert make_policy(head_hidden_size=7).state_dict()["temperature_head.up.weight"].shape == (7, WIDTH)


def test_ranges_stretch_the_sigmoid():
    state = make_state(200)
    policy = make_policy(output_scale=30.0, temperature_range=(0.3, 1.2), top_p_range=[0.5, 0.9])
    found = policy(state)
    for values, low, high in ((found.temperature, 0.3, 1.2), (found.top_p, 0.5, 0.9)):
        assert low - 1e-6 <= values.min() < low + 0.05
        assert high - 0.05 < values.max() <= high + 1e-6


@pytest.mark.parametrize(("heads", "absent"), [(["temperature"], "top_p"), (["top_p"], "temperature")])
def test_a_parameter_without_a_head_is_left_off(heads, absent):
    policy = make_policy(heads=heads)
    found = policy(make_state())
    assert vars(found)[absent] is None
    assert vars(found)[heads[0]].shape == (6,)
    assert all(name.startswith(heads[0]) for name in policy.state_dict())


def test_a_lone_top_p_head_reads_a_temperature_of_one():
    policy, state = make_policy(heads=["top_p"]), make_state()
    x = torch.cat([state.hidden, torch.ones(6, 1)], dim=1)
    head = policy.top_p_head
    by_hand = torch.sigmoid(torch.relu(x @ head.up.weight.T + head.up.bias) @ head.out.weight.T + head.out.bias)[:, 0]
    assert torch.allclose(policy(state).top_p, by_hand, atol=1e-6)


def statistics_by_hand(row: list[float]) -> list[float]:
    """In Python's own double precision, straight from the definitions."""
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    p = [w / sum(weights) for w in weights]
    mean = 1 / len(p)
    return [
        max(p),
        -sum(x * math.log(x) for x in p if x > 0),
        sum((x - mean) ** 2 for x in p),  # the variance, times the number of words
        sum(sorted(p)[-5:]),
    ]


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 9,
        [5.0, 1.0, 0.5, -2.0, 0.0, 3.0, 3.0],
        [100.0, 0.0, 0.0],
        [2.0, -math.inf, 1.0, -math.inf, -math.inf, 0.0, -4.0, -1.0],
        [-math.inf, -math.inf, 7.0, -math.inf],
        [-5000.0, -5001.0, -math.inf],
        [1.0, 2.0],
    ],
    ids=["flat", "plain", "certain", "masked", "one left", "far from zero", "two words"],
)
def test_statistics_follow_their_definitions(row):
    found = logit_statistics(torch.tensor([row]))
    assert found.shape == (1, len(STATISTICS))
    assert found.dtype == torch.float32
    assert torch.allclose(found[0].double(), torch.tensor(statistics_by_hand(row)).double(), atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-40, 40), min_size=2, max_size=30), st.floats(-1000, 1000))
def test_statistics_do_not_change_when_all_logits_move(row, shift):
    logits = torch.tensor([row], dtype=torch.float64)
    assert torch.allclose(logit_statistics(logits), logit_statistics(logits + shift), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_computed_in_fp32(dtype):
    logits = (torch.randn(3, 400) * 5).to(dtype)
    found = logit_statistics(logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, logit_statistics(logits.float()))


def test_heads_with_statistics_read_hidden_state_then_statistics():
    policy, state = make_policy(features=["hidden", "statistics"]), make_state()
    assert policy.needs_logits
    assert not make_policy().needs_logits
    features = torch.cat([state.hidden, torch.tensor([statistics_by_hand(r) for r in state.logits.tolist()])], dim=1)
    temperature, top_p = tiny.heads_by_hand(policy, features)
    found = policy(state)
    assert torch.allclose(found.temperature, temperature, atol=1e-4)
    assert torch.allclose(found.top_p, top_p, atol=1e-4)


def test_forbidden_tokens_do_not_break_the_statistics_heads():
    state = make_state()
    masked = DecodeState(state.hidden, state.logits.masked_fill(torch.rand(6, VOCABULARY) < 0.9, -math.inf))
    masked.logits[:, 3] = 1.0
    found = make_policy(features=["hidden", "statistics"])(masked)
    assert torch.isfinite(found.temperature).all()
    assert torch.isfinite(found.top_p).all()


@pytest.mark.parametrize("features", [["hidden"], ["hidden", "statistics"]], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_states_give_fp32_parameters(dtype, features):
    policy, state = make_policy(features=features), make_state(dtype=dtype)
    found = policy(state)
    expected = policy(DecodeState(state.hidden.float(), state.logits))
    for name in ("temperature", "top_p"):
        assert vars(found)[name].dtype == torch.float32
        assert torch.equal(vars(found)[name], vars(expected)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_policy_cast_to_half_precision_still_computes_in_fp32(dtype):
    state = make_state()
    cast = make_policy().to(dtype)
    rounded = make_policy()
    rounded.load_state_dict({k: v.to(dtype).float() for k, v in rounded.state_dict().items()})
    found, expected = cast(state), rounded(state)
    assert found.temperature.dtype == found.top_p.dtype == torch.float32
    assert torch.equal(found.temperature, expected.temperature)
    assert torch.equal(found.top_p, expected.top_p)


@pytest.mark.parametrize("features", [["hidden"], ["hidden", "statistics"]], ids="+".join)
def test_autocast_changes_nothing(features):
    policy, state = make_policy(features=features), make_state()
    expected = policy(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = policy(state)
    assert found.temperature.dtype == found.top_p.dtype == torch.float32
    assert torch.equal(found.temperature, expected.temperature)
    assert torch.equal(found.top_p, expected.top_p)


@pytest.mark.parametrize("features", [["hidden"], ["hidden", "statistics"]], ids="+".join)
def test_a_row_depends_on_itself_alone(features):
    policy, state = make_policy(features=features), make_state(9)
    together = policy(state)
    order = torch.randperm(9)
    permuted = policy(DecodeState(state.hidden[order], state.logits[order]))
    alone = [policy(DecodeState(state.hidden[i : i + 1], state.logits[i : i + 1])) for i in range(9)]
    for name in ("temperature", "top_p"):
        assert torch.allclose(vars(permuted)[name], vars(together)[name][order], atol=1e-6)
        assert torch.allclose(torch.cat([vars(a)[name] for a in alone]), vars(together)[name], atol=1e-6)


def test_a_fresh_adapter_is_close_to_plain_sampling():
    policy = tiny.wrap().decoding_adapter
    hidden, logits = (x.flatten(0, 1) for x in tiny.hidden_and_logits(tiny.build_base(), tiny.prompts(6, 20)))
    parameters = policy(DecodeState(hidden))
    assert (parameters.temperature - 1).abs().max() < 0.05
    assert parameters.top_p.min() > 0.97
    warped = warp_logits(logits, parameters).softmax(-1)
    # At most the 0.03 that the nucleus cuts off, and a little for the temperature.
    assert ((warped - logits.softmax(-1)).abs().sum(-1) / 2).max() < 0.05


def test_with_detached_temperature_the_top_p_loss_does_not_reach_the_temperature_head():
    for detach in (False, True):
        policy = make_policy(detach_temperature=detach)
        policy(make_state()).top_p.sum().backward()
        gradients = [p.grad for p in policy.temperature_head.parameters()]
        reached = any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
        assert reached is not detach
        assert all(p.grad is not None for p in policy.top_p_head.parameters())
    assert torch.equal(make_policy(detach_temperature=True)(make_state()).top_p, make_policy()(make_state()).top_p)


def test_every_head_weight_gets_a_gradient():
    policy = make_policy(features=["hidden", "statistics"])
    found = policy(make_state())
    (found.temperature.sum() + found.top_p.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_policy_names_are_the_classes_there_are():
    assert set(POLICY_NAMES) == set(POLICIES)


def test_a_single_static_action_holds_for_every_row_and_draws_nothing():
    policy = make_policy(policy="static", actions=[{"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = policy(make_state(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.has_actions
    assert torch.allclose(found.temperature, torch.full((4,), 0.7))
    assert torch.allclose(found.top_p, torch.full((4,), 0.9))
    assert torch.allclose(found.min_p, torch.full((4,), 0.1))
    assert found.top_k.tolist() == [5] * 4
    assert found.action.tolist() == [0] * 4


def test_what_an_action_leaves_out_is_off():
    policy = make_policy(policy="static", actions=[GREEDY, WARM, {"min_p": 0.2}])
    found = policy(make_state(60))
    for row, action in enumerate(found.action.tolist()):
        given_action = [GREEDY, WARM, {"min_p": 0.2}][action]
        for name, off in (("temperature", 1.0), ("top_k", 0), ("min_p", 0.0)):
            assert float(vars(found)[name][row]) == pytest.approx(given_action.get(name, off))
    assert found.top_p is None


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, [1 / 3] * 3), ([1, 6, 3], [0.1, 0.6, 0.3]), ([0, 1, 1], [0, 0.5, 0.5])]
)
def test_a_mixture_has_the_frequencies_of_its_weights(weights, expected):
    """20,000 draws; a count further than 5 standard deviations off has odds below 1e-6."""
    draws = 20_000
    policy = make_policy(policy="static", actions=[GREEDY, WARM, {"top_p": 0.5}], action_weights=weights)
    counts = policy(DecodeState(torch.zeros(draws, WIDTH))).action.bincount(minlength=3)
    for count, p in zip(counts.tolist(), expected, strict=True):
        assert abs(count - draws * p) <= 5 * math.sqrt(draws * p * (1 - p))


def test_a_mixture_follows_torchs_seed():
    policy, state = make_policy(policy="static", actions=[GREEDY, WARM]), make_state(50)
    torch.manual_seed(1)
    first = policy(state).action
    torch.manual_seed(1)
    assert torch.equal(policy(state).action, first)
    assert not torch.equal(policy(state).action, first)


BAD_SETTINGS = [
    {"policy": "mind_reading"},
    {"policy": None},
    {"policy": ["heads"]},
    {"format_version": FORMAT_VERSION + 1},
    {"format_version": 0},
    {"format_version": True},
    {"format_version": "1"},
    {"format_version": 1.0},
    {"heads": []},
    {"heads": "temperature"},
    {"heads": ["temperature", "temperature"]},
    {"heads": ["top_k"]},
    {"heads": [["temperature"]]},
    {"heads": None},
    {"heads": [None]},
    {"head_hidden_size": 0},
    {"head_hidden_size": -1},
    {"head_hidden_size": 10**9},
    {"head_hidden_size": 2.5},
    {"head_hidden_size": math.inf},
    {"head_hidden_size": "256"},
    {"head_hidden_size": True},
    {"features": "hidden"},
    {"features": []},
    {"features": ["hidden", "hidden"]},
    {"features": ["mood"]},
    {"detach_temperature": None},
    {"temperature_range": [0.0]},
    {"temperature_range": [1.0, 0.5]},
    {"temperature_range": [0.5, 0.5]},
    {"temperature_range": [-1.0, 1.0]},
    {"temperature_range": [0.0, math.inf]},
    {"temperature_range": [0.0, math.nan]},
    {"temperature_range": [0.0, 1e9]},
    {"temperature_range": 2.0},
    {"temperature_range": ["0", "2"]},
    {"top_p_range": [0.0, 1.5]},
    {"top_p_range": None},
    {"hidden_size": 0},
    {"hidden_size": 10**12},
    {"hidden_size": "32"},
    {"vocab_size": -3},
    {"vocab_size": 1.5},
    {"base_model_name_or_path": 3},
    {"base_model_revision": ["main"]},
    {"base_fingerprint": {}},
    {"library_version": 1},
    {"policy": "static"},
    {"policy": "static", "actions": []},
    {"actions": "greedy"},
    {"actions": [3]},
    {"actions": [None]},
    {"actions": [{"temperatur": 0.5}]},
    {"actions": [{"temperature": 0.5, "typical_p": 0.9}]},
    {"actions": [{3: 0.5, "x": 1}]},
    {"actions": [{"temperature": -1}]},
    {"actions": [{"temperature": math.nan}]},
    {"actions": [{"temperature": math.inf}]},
    {"actions": [{"temperature": "hot"}]},
    {"actions": [{"temperature": [0.5]}]},
    {"actions": [{"temperature": {}}]},
    {"actions": [{"top_k": 1.5}]},
    {"actions": [{"top_k": math.inf}]},
    {"actions": [{"top_p": 2}]},
    {"actions": [{"min_p": -0.1}]},
    {"actions": [{"temperature": True}]},
    {"actions": [GREEDY] * 100_000},
    {"actions": [GREEDY, WARM], "action_weights": [1.0]},
    {"actions": [GREEDY, WARM], "action_weights": [0.0, 0.0]},
    {"actions": [GREEDY, WARM], "action_weights": [2.0, -1.0]},
    {"actions": [GREEDY, WARM], "action_weights": [math.nan, 1.0]},
    {"actions": [GREEDY, WARM], "action_weights": [math.inf, 1.0]},
    {"actions": [GREEDY, WARM], "action_weights": ["1", "2"]},
    {"actions": [GREEDY, WARM], "action_weights": 1.0},
    {"action_weights": [], "actions": []},
    {"actions": [{"top_k": None}]},
]


@pytest.mark.parametrize("bad", BAD_SETTINGS, ids=lambda bad: str(bad)[:70])
def test_a_bad_setting_is_refused_and_named(bad):
    with pytest.raises(AdapterConfigError) as caught:
        AutoDecoConfig(**bad)
    assert isinstance(caught.value, AdaptiveDecodeError)
    assert isinstance(caught.value, ValueError)
    last = list(bad)[-1]
    assert last.removesuffix("s") in str(caught.value)


@pytest.mark.parametrize(
    "actions_and_weights",
    [
        {"actions": [{"top_k": 2**70}]},
        {"actions": [{"temperature": 1e39}]},
        {"actions": [GREEDY, WARM], "action_weights": [1e39, 1.0]},
        {"actions": [GREEDY, WARM], "action_weights": [1e308, 1e308]},
        {"actions": [GREEDY, WARM], "action_weights": [1e-60, 1e-60]},
    ],
    ids=lambda bad: str(bad)[-40:],
)
def test_numbers_that_tensors_cannot_hold_are_refused_or_work(actions_and_weights):
    """A config that is accepted has to make a policy that can be sampled with."""
    try:
        config = AutoDecoConfig(policy="static", hidden_size=WIDTH, **actions_and_weights)
    except AdapterConfigError:
        return
    state = make_state()
    logits = state.logits.masked_fill(torch.arange(VOCABULARY) % 2 == 0, -math.inf)
    assert not warp_logits(logits, build_policy(config)(state)).isnan().any()


def test_a_newer_format_says_how_to_read_it():
    with pytest.raises(AdapterConfigError) as caught:
        AutoDecoConfig(format_version=FORMAT_VERSION + 6, library_version="9.9.9")
    message = str(caught.value)
    assert all(part in message for part in (str(FORMAT_VERSION + 6), "9.9.9", str(FORMAT_VERSION), "pip install -U"))


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {
            "heads": ("top_p",),
            "head_hidden_size": 8,
            "temperature_range": (0.1, 1.5),
            "features": ["hidden", "statistics"],
        },
        {"policy": "static", "actions": [GREEDY, WARM], "action_weights": [0.25, 0.75]},
        {"hidden_size": 32, "vocab_size": 96, "base_model_name_or_path": "a/b", "base_fingerprint": "0f"},
    ],
)
def test_a_config_survives_json(chosen, tmp_path):
    config = AutoDecoConfig(**chosen)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    again = read_config(tmp_path / "config.json")
    assert again.to_dict() == config.to_dict()
    assert AutoDecoConfig(**json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved" / "config.json").to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["AutoDecoForCausalLM"]


def test_a_config_does_not_share_its_lists_with_the_caller():
    heads = ["temperature"]
    config = AutoDecoConfig(heads=heads)
    heads.append("nonsense")
    assert config.heads == ["temperature"]


def write_config(tmp_path, **values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "autodeco", **values}))
    return path


def test_a_number_of_labels_in_a_config_allocates_nothing(tmp_path):
    """transformers makes one name a label; a short file must not be able to ask for a billion of them."""
    try:
        config = read_config(write_config(tmp_path, num_labels=200_000))
    except AdapterConfigError:
        return
    assert len(config.id2label or {}) < 1000


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
KEYS = sorted(set(AutoDecoConfig().to_dict()) - {"model_type", "num_labels"})


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=3))
def test_any_value_of_a_config_is_taken_or_refused_as_a_config_error(tmp_path_factory, values):
    try:
        config = read_config(write_config(tmp_path_factory.mktemp("config"), **values))
    except AdapterConfigError:
        return
    config.hidden_size = WIDTH
    if config.head_hidden_size < 1024:
        build_policy(config)


@pytest.mark.parametrize("key", ["id2label", "dtype", "problem_type", "architectures", "chunk_size_feed_forward"])
@pytest.mark.parametrize("value", ["nonsense", 5, [1], {"a": 1}, -1.5])
def test_a_bad_inherited_setting_is_refused_as_a_config_error(tmp_path, key, value):
    with contextlib.suppress(AdapterConfigError):
        read_config(write_config(tmp_path, **{key: value}))


def test_read_config_refuses_a_large_file_before_reading_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterConfigError, match="1 MiB"):
        read_config(path)


def test_sampling_parameters_select_rows_and_keep_scalars():
    parameters = SamplingParameters(torch.tensor([0.1, 0.2, 0.3]), top_p=0.9, action=torch.tensor([4, 5, 6]))
    chosen = parameters.select(torch.tensor([2, 0]))
    assert chosen.temperature.tolist() == pytest.approx([0.3, 0.1])
    assert chosen.action.tolist() == [6, 4]
    assert (chosen.top_p, chosen.top_k) == (0.9, None)
