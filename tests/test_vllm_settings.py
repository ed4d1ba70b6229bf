"""What goes to vLLM's own sampler, and what is decided for it here: all that needs no vLLM."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_rollout import ACTIONS, ENDS, POLICIES, PROMPTS, policy_of, rows_of, static
from test_tokens import Numbers

from hf_adaptive_decode import AutoDecoConfig
from hf_adaptive_decode.engines.by_name import build_engine
from hf_adaptive_decode.engines.deciding import decide_first, decides_here
from hf_adaptive_decode.engines.rollout import decode
from hf_adaptive_decode.engines.vllm_settings import constrained_as, route, sampled_otherwise
from hf_adaptive_decode.errors import MissingExtraError, UnsupportedGenerationError
from hf_adaptive_decode.policies import StaticPolicy
from hf_adaptive_decode.types import SamplingParameters
from hf_adaptive_decode.warping import warp_logits

# --- settings ---------------------------------------------------------------------------------------------------------


def as_vllm_samples(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """
    vLLM's order: temperature, min-p, top-k, top-p; each on what the one before has left. And whether the nucleus ends
    clearly, rather than at an edge that two sums see differently by their last bit.
    """
    if temperature == 0:
        return torch.where(logits == logits.max(), 0.0, -torch.inf).double(), True
    scores = logits / max(temperature, 0.01)
    p = scores.softmax(-1)
    scores = scores.masked_fill(p < min_p * p.max(), -torch.inf)
    order = scores.argsort(descending=True)
    if top_k:
        scores[order[top_k:]] = -torch.inf
    clear = True
    if top_p < 1:
        mass = scores.softmax(-1)[order].cumsum(-1)
        clear = not torch.isclose(mass, torch.tensor(top_p).double()).any()
        scores[order[1:][mass[:-1] >= top_p]] = -torch.inf
    return scores.log_softmax(-1), clear


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.004, 0.01, 0.5, 1.0, 1.7, 2.0, 2.5]),
        "top_k": st.integers(0, 12),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.5),
    },
)


@examples(max_examples=300)
@given(SETTINGS, st.integers(0, 10_000))
def test_what_is_left_to_vllms_sampler_it_does_as_the_warp_does(settings, seed):
    assume(sampled_otherwise(settings) is None)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    ours = warp_logits(logits[None], SamplingParameters(**settings))[0].log_softmax(-1)
    theirs, clear = as_vllm_samples(logits, **settings)
    assume(clear)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 1.5, "top_p": 0.7, "min_p": 0.2}, "min-p before top-p"),
        ({"temperature": 0.004}, "from 0.01 to 2, and 0.004"),
    ],
)
def test_what_is_not_differs_indeed(settings, said):
    assert said in sampled_otherwise(settings)
    generator = torch.Generator().manual_seed(0)
    differ = 0
    for logits in torch.randn(40, 40, generator=generator, dtype=torch.float64) * (
        0.01 if "top_p" not in settings else 2
    ):
        ours = warp_logits(logits[None], SamplingParameters(**settings))[0].log_softmax(-1)
        differ += not torch.allclose(ours, as_vllm_samples(logits, **settings)[0], atol=1e-6)
    assert differ > 10


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("batch_rows", [None, 3])
def test_a_policy_that_decides_once_is_asked_as_the_decode_loop_asks_it(pooling, batch_rows):
    base = tiny.build_base()
    policy = policy_of(base, **{**POLICIES["sequence"], "pooling": pooling, "budget_features": ["samples", "tokens"]})
    rows = rows_of(PROMPTS, per=5, budget=torch.tensor([12, 5, 9, 7]).repeat_interleave(5), samples=4)
    theirs = decode(base, policy, rows, ends=ENDS, pad=0, records="decisions").decisions
    traced = decode(base, policy, rows, ends=ENDS, pad=0, records="parameters")
    parameters, ours = decide_first(base, policy, rows, 0, batch_rows)
    for name in ("action", "row", "step"):
        assert torch.equal(vars(ours)[name], vars(theirs)[name])
    for name in ("context", "remaining_tokens", "parallel_samples"):
        torch.testing.assert_close(vars(ours.seen)[name], vars(theirs.seen)[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(parameters.action, traced.action[:, 0])
    torch.testing.assert_close(parameters.temperature, traced.temperature[:, 0])
    torch.testing.assert_close(parameters.top_p, traced.top_p[:, 0])
    assert len(set(ours.action.tolist())) > 1


def test_a_mixture_a_sequence_is_drawn_without_reading_a_prompt():
    base = tiny.build_base()
    policy = static(*ACTIONS, mixture_per="sequence", action_weights=[1.0, 2.0, 1.0])
    rows = rows_of(PROMPTS, per=6)
    traced = decode(base, policy, rows, ends=ENDS, pad=0, records="parameters")
    with tiny.counted_forwards(base) as calls:
        parameters, decisions = decide_first(base, policy, rows, 0)
    assert not calls
    assert decisions is None
    assert torch.equal(parameters.action, traced.action[:, 0])


def by(plugin, **settings):
    return route(policy_of(tiny.build_base(), **settings), with_plugin=plugin)


def test_who_samples_what():
    once = {"policy": "sequence_actions", "actions": ACTIONS}
    odd = [{"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}]
    assert by(True, **once) == by(False, **once) == (True, None)
    assert by(False, **{**once, "pooling": "mean"}) == (True, None)
    assert by(False, policy="static", actions=[{"temperature": 0.5}]) == (True, None)
    assert by(True, policy="static", actions=[{"temperature": 2.5}]) == (False, None)
    assert by(True, **{**once, "actions": odd}) == (False, None)
    assert by(True, policy="heads") == by(True, policy="static", actions=ACTIONS) == (False, None)
    assert by(True, policy="static", actions=[{"temperature": 0.5}], max_prob_mask=0.9) == (False, None)
    assert 'cannot draw as this "heads" policy says' in by(False, policy="heads")[1]
    assert "min-p before top-p" in by(False, **{**once, "actions": odd})[1]
    assert 'reads their mean (`pooling="mean"`)' in by(True, **{**once, "actions": odd, "pooling": "mean"})[1]


class Own(StaticPolicy):
    """Of a kind that no worker knows."""


def test_a_policy_without_a_name_is_refused():
    own = Own(AutoDecoConfig(policy="static", actions=ACTIONS[:1]))
    assert decides_here(own)
    assert "Own has no name" in route(own, with_plugin=True)[1]


# --- models -----------------------------------------------------------------------------------------------------------


def test_constraints_are_passed_on_or_refused(base):
    assert constrained_as(base) == ({}, None)
    base.generation_config.update(repetition_penalty=1.3, min_new_tokens=4)
    assert constrained_as(base) == ({"repetition_penalty": 1.3, "min_tokens": 4}, None)
    base.generation_config.update(no_repeat_ngram_size=2)
    assert "NoRepeatNGramLogitsProcessor, which vLLM is not told of" in constrained_as(base)[1]


def test_a_model_that_lies_nowhere_is_refused(base):
    with pytest.raises(UnsupportedGenerationError, match="save it with `save_pretrained`"):
        build_engine("vllm", base, Numbers())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_install_command_is_named(base, tmp_path):
    base.config.name_or_path = str(tmp_path)
    with pytest.raises(MissingExtraError, match=r"pip install 'hf_adaptive_decode\[vllm\]'"):
        build_engine("vllm", base, Numbers()).complete(["5 6"], token_budget=2)


def test_a_server_that_is_not_there_is_named(base):
    with pytest.raises(UnsupportedGenerationError, match=r"no vLLM answers at http://127.0.0.1:9 .*vllm serve BASE"):
        build_engine("vllm_server", base, Numbers(), url="http://127.0.0.1:9").complete(["5 6"], token_budget=2)
    with pytest.raises(ValueError, match="has to begin with http"):
        build_engine("vllm_server", base, Numbers(), url="file:///etc/hostname")
