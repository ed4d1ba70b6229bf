"""What `generate` does with each kind of adapter when logits, weights or constraints leave nothing to sample from."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from adapter_kinds import ENDLESS, KINDS, NEVER, TRACED, WITH_WEIGHTS, Change, build, filled
from test_batching import batching, settings
from tiny import VOCABULARY, hooks_left, prompts, sample

from hf_adaptive_decode import AutoDecoConfig, SamplingParameters
from hf_adaptive_decode.errors import AdaptiveDecodeError, LogitsError
from hf_adaptive_decode.warping import warp_logits


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --- logits that nobody can sample from ------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "named"), [(math.nan, "NaN"), (math.inf, r"\+inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_broken_logits_are_named_by_step_and_row_whatever_decides(kind, value, named, step):
    model = build(kind)
    broken = Change(value, length=5 + step)
    with pytest.raises(LogitsError, match=rf"step {step}, row 1\b.*{named}"):
        model.generate(prompts(), max_new_tokens=4, logits_processor=[broken], **ENDLESS)
    assert hooks_left(model) == 0


def test_a_row_with_nothing_left_is_named_whatever_decides(kind):
    nothing = Change(NEVER, slice(None), length=7)
    with pytest.raises(LogitsError, match=r"step 2, row 1\b.*no token above -inf"):
        build(kind).generate(prompts(), max_new_tokens=4, logits_processor=[nothing], **ENDLESS)


@pytest.mark.parametrize("names", [["default", "other", "__base__"]])
def test_broken_logits_are_named_in_a_mixed_batch(model, names):
    model.add_adapter("other", AutoDecoConfig(**KINDS["a mixture"]))
    with pytest.raises(LogitsError, match=r"step 1, row 1\b.*NaN"):
        model.generate(
            prompts(),
            adapter_names=names,
            max_new_tokens=4,
            logits_processor=[Change(math.nan, length=6)],
            **ENDLESS,
        )


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"temperature": torch.tensor([0.5, 0.0, 2.0]), "top_k": torch.tensor([2, 3, 0]), "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_the_warp_leaves_a_row_without_any_token_as_it_is(parameters):
    logits = torch.randn(3, VOCABULARY)
    logits[1] = NEVER
    found = warp_logits(logits, SamplingParameters(**parameters))
    assert (found[1] == NEVER).all()
    whole = torch.randn(3, VOCABULARY)
    whole[[0, 2]] = logits[[0, 2]]
    assert torch.equal(found[[0, 2]], warp_logits(whole, SamplingParameters(**parameters))[[0, 2]])


# --- parameters at their ends and beyond ------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["temperature_head", "top_p_head"])
@pytest.mark.parametrize("heads", [k for k in KINDS if k.startswith("heads")])
def test_a_head_that_goes_to_zero_leaves_the_likeliest_token(head, heads):
    """A sigmoid of -1e4 is 0 in every float."""
    model = build(heads)
    with torch.no_grad():
        getattr(model.decoding_adapter, head).out.bias.fill_(-1e4)
    settings = {"max_new_tokens": 6, **ENDLESS}
    found = sample(model, prompts(), **settings, **TRACED)
    assert torch.equal(found.sequences, model.generate(prompts(), do_sample=False, **settings))
    column = found.decoding_trace.temperature if head == "temperature_head" else found.decoding_trace.top_p
    assert (column == 0).all()
    assert all((scores > NEVER).sum(-1).eq(1).all() for scores in found.scores)


@pytest.mark.parametrize("heads", [k for k in KINDS if k.startswith("heads")])
def test_a_head_that_goes_to_its_other_end_stays_within_its_range(heads):
    model = build(heads)
    with torch.no_grad():
        model.decoding_adapter.temperature_head.out.bias.fill_(1e4)
        model.decoding_adapter.top_p_head.out.bias.fill_(1e4)
    found = sample(model, prompts(), max_new_tokens=4, **TRACED, **ENDLESS)
    assert (found.decoding_trace.temperature == 2).all()
    assert (found.decoding_trace.top_p == 1).all()
    assert all(torch.isfinite(scores).all() for scores in found.scores)


@pytest.mark.parametrize(
    "action", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-30}], ids=str
)
@pytest.mark.parametrize("policy", ["token_actions", "sequence_actions", "static"])
def test_the_narrowest_action_is_greedy(policy, action):
    model = tiny.wrap(policy=policy, actions=[action])
    settings = {"max_new_tokens": 6, **ENDLESS}
    assert torch.equal(sample(model, prompts(), **settings), model.generate(prompts(), do_sample=False, **settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {}) for kind in WITH_WEIGHTS]
    + [(kind, {"deterministic": True}) for kind in WITH_WEIGHTS if "actions" in kind],
)
def test_a_policy_whose_weights_overflow_is_named_by_step_and_row(kind, settings):
    """Every weight is finite, and their sums are not."""
    model = filled(build(kind, **settings), 3e38)
    with pytest.raises(LogitsError, match=r"step 0, row 0\b.*the policy gave nan as temperature.*the base it was"):
        model.generate(prompts(), max_new_tokens=3, **ENDLESS)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_one_bad_hidden_state_is_one_rows(kind):
    """The others' parameters are what they would have been, so that it is this row which is named."""
    model = build(kind)
    bad = 90
    ids = prompts()
    ids[1, -1] = bad
    assert (ids == bad).sum() == 1
    with torch.no_grad():  # infinite on the way into the policy alone: the logits of the row are replaced
        model.get_input_embeddings().weight[bad] = math.nan
    finite = Change(0.0, slice(None), length=0)
    with pytest.raises(LogitsError, match=r"step 0, row 1\b.*the policy gave nan as temperature"):
        model.generate(ids, max_new_tokens=3, logits_processor=[finite], **ENDLESS)


@pytest.mark.parametrize(("breaks", "said"), [("policy", "the policy gave nan as temperature"), ("base", "NaN")])
def test_what_breaks_down_is_the_error_of_its_request_in_continuous_batches(breaks, said):
    model = build("token actions")
    if breaks == "policy":
        filled(model, 3e38)
    else:
        model.get_output_embeddings().weight.data[3] = math.nan
    found = model.generate_batch([[5, 6, 7], [8, 9]], settings(), batching(), warmup=False)
    assert len(found) == 2
    assert all(said in one.error for one in found.values())
    paged = {"cache_implementation": "paged", "continuous_batching_config": batching(), "max_new_tokens": 4}
    with pytest.raises(AdaptiveDecodeError, match=said):
        model.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), **paged)


def test_where_the_base_is_sure_a_broken_policy_is_not_asked():
    model = filled(build("masked token actions", max_prob_mask=0.0), 3e38)
    greedy = model.generate(prompts(), do_sample=False, max_new_tokens=4, **ENDLESS)
    assert torch.equal(model.generate(prompts(), max_new_tokens=4, **ENDLESS), greedy)


def test_logits_at_the_end_of_half_precision_are_divided_in_fp32(kind):
    base = tiny.build_base().half()
    with torch.no_grad():
        spread = base(prompts()).logits.abs().max()
        base.get_output_embeddings().weight.mul_(6e4 / float(spread))
        assert base(prompts()).logits.abs().max() > 5e4
    model = build(kind, base)
    found = sample(model, prompts(), max_new_tokens=3, temperature=0.01, **TRACED, **ENDLESS)
    for scores in found.scores:
        assert scores.dtype == torch.float32
        assert not scores.isnan().any()
        assert (scores < math.inf).all()
        assert scores.softmax(-1).sum(-1).allclose(torch.ones(3))
    free = sample(model, prompts(), max_new_tokens=3, **TRACED, **ENDLESS)
    assert torch.isfinite(free.decoding_trace.temperature).all()


# --- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint",
    [
        {"prefix_allowed_tokens_fn": lambda batch, ids: [9, 10, 11]},
        {"bad_words_ids": [[t] for t in range(VOCABULARY) if t not in (9, 10, 11)]},
        {"suppress_tokens": [t for t in range(VOCABULARY) if t not in (9, 10, 11)]},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_what_a_constraint_forbids_stays_forbidden_whatever_decides(kind, constraint):
    settings = {"temperature": 1.9} if kind == "edt" else {}
    found = sample(build(kind), prompts(), max_new_tokens=6, **constraint, **settings, **TRACED, **ENDLESS)
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[9, 10, 11]] = True
    assert set(found.sequences[:, 5:].flatten().tolist()) <= {9, 10, 11}
    for scores in found.scores:
        assert (scores[:, ~allowed] == NEVER).all()
        assert (scores[:, allowed] > NEVER).any(-1).all()
