"""The searches behind `warp_logits` against sorted rows in double precision; and what a step asks of an accelerator."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_adaptive_decode import AutoDecoConfig, SamplingParameters, nucleus, warping
from hf_adaptive_decode.checks import StepChecks
from hf_adaptive_decode.errors import LogitsError
from hf_adaptive_decode.features import logit_statistics
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.types import DecodeState
from hf_adaptive_decode.warping import warp_logits

NEVER = -math.inf
# All that a device may be asked to do; what runs where is decided by the device, and each is right on any.
SEARCHES = {
    "sort": nucleus._edge_by_sort,
    "buckets": nucleus._edge_by_buckets,
    "radix": nucleus._edge_by_radix,
}


def make_rows(seed: int, rows: int, vocabulary: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocabulary, generator=generator)
    if kind == "ties":
        return (scores * 4).mul(2).round().div(2)
    if kind == "bf16":
        return (scores * 3).bfloat16().float()
    if kind == "never":
        gone = torch.rand(rows, vocabulary, generator=generator) < 0.7
        return (scores * 5).masked_fill(gone.scatter_(1, scores.argmax(-1, keepdim=True), False), NEVER)
    if kind == "spike":
        scores[:, 7] = 80.0
        return scores
    return scores * {"flat": 0.05, "middling": 2.0, "peaked": 9.0, "far": 300.0}[kind]


def truth(row: torch.Tensor, mass: float, floor: float) -> tuple[float, int, bool]:
    """The edge's score, how many of that score belong to the nucleus, and whether there are more, by sorting."""
    row = row.double()
    kept = row[row >= floor]
    order = kept.sort(descending=True).values
    p = order.softmax(-1)
    ahead = p.cumsum(-1) - p
    size = max(int((ahead < mass).sum()), 1)
    edge = order[size - 1]
    return (
        float(edge),
        int((order[:size] == edge).sum()),
        int((order == edge).sum()) > int((order[:size] == edge).sum()),
    )


def clear_mass(row: torch.Tensor, share: float, floor: float) -> float:
    """About `share`, where no rounding of a sum can move the nucleus: in the middle of a token's own probability."""
    row = row.double()
    p = row[row >= floor].softmax(-1).sort(descending=True).values
    ahead = p.cumsum(-1) - p
    place = int((ahead < share).sum()) - 1
    wide = (p[: place + 1] > 1e-5).nonzero()
    place = int(wide[-1]) if len(wide) else 0
    return float(ahead[place] + p[place] / 2)


@pytest.mark.parametrize("search", SEARCHES)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from([17, 1023, 1500, 20000]),
    kind=st.sampled_from(["flat", "middling", "peaked", "far", "ties", "bf16", "never", "spike"]),
    shares=st.lists(st.floats(0.0, 0.9999), min_size=1, max_size=4),
    has_floor=st.booleans(),
)
def test_every_search_ends_the_nucleus_where_a_sorted_row_does(search, seed, vocabulary, kind, shares, has_floor):
    scores = make_rows(seed, len(shares), vocabulary, kind)
    peak = scores.amax(-1, keepdim=True)
    floor = peak - 3.0 if has_floor else None
    floors = [float(f) for f in (peak - 3.0)] if has_floor else [NEVER] * len(shares)
    masses = [clear_mass(row, share, low) for row, share, low in zip(scores, shares, floors, strict=True)]
    found = SEARCHES[search](scores, peak, torch.tensor(masses, dtype=torch.float64), floor)
    assert found.score.shape == (len(shares), 1)
    for i, (row, mass, low) in enumerate(zip(scores, masses, floors, strict=True)):
        assert (float(found.score[i]), int(found.count[i]), bool(found.more[i])) == truth(row, mass, low), (i, mass)
    if found.among is not None:
        inside = (scores >= found.score) & (scores >= (NEVER if floor is None else floor))
        assert set(inside.flatten().nonzero().squeeze(1).tolist()) <= set(found.among.tolist())
        assert (np.diff(found.among) > 0).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_row_with_all_the_mass_has_no_edge_and_one_with_none_keeps_the_best(search):
    scores = make_rows(0, 4, 3000, "middling")
    found = SEARCHES[search](scores, scores.amax(-1, keepdim=True), torch.tensor([1.0, 0.0, 1.5, 1e-9]), None)
    assert found.score[0] == found.score[2] == NEVER
    assert not found.more.any()
    assert torch.equal(found.score[[1, 3], 0], scores[[1, 3]].amax(-1))
    assert found.count[1] == found.count[3] == 1
    assert found.among is None  # two rows keep everything


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_tokens_as_many_are_kept_as_the_mass_needs(search, dtype):
    scores = torch.zeros(3, 4000, dtype=dtype)
    found = SEARCHES[search](scores, scores[:, :1], torch.tensor([0.1001, 0.5001, 0.99999]), None)
    assert found.score.tolist() == [[0.0]] * 3
    assert found.count.tolist() == [401, 2001, 4000]
    assert found.more.tolist() == [True, True, False]


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from([2, 31, 200, 5003]),
    kind=st.sampled_from(["flat", "peaked", "ties", "bf16", "never"]),
    ks=st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
def test_the_kth_largest_is_that_of_a_sorted_row(seed, vocabulary, kind, ks):
    scores = make_rows(seed, len(ks), vocabulary, kind)
    ranked = scores.sort(-1, descending=True).values
    wanted = [[NEVER if k == 0 else float(row[min(k, vocabulary) - 1])] for k, row in zip(ks, ranked, strict=True)]
    assert nucleus.kth_largest(scores, torch.tensor(ks)).tolist() == wanted
    by_radix = nucleus._radix_search(scores, None, torch.tensor(ks).clamp(1, vocabulary).double())[0]
    assert [by_radix[i].tolist() for i, k in enumerate(ks) if k] == [w for w, k in zip(wanted, ks, strict=True) if k]
    first = max(ks[0], 1)
    assert torch.equal(nucleus.largest(scores, min(first, vocabulary)), ranked[:, : min(first, vocabulary)])


def test_both_zeros_are_one_score():
    scores = torch.tensor([[0.0, -0.0, 1.0, -0.0, -1.0] + [-9.0] * 2000])
    assert nucleus._radix_search(scores, None, torch.tensor([3.0]).double())[0].item() == 0.0


@contextmanager
def on_an_accelerator():
    """Within it the code for accelerators runs, on this processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nucleus, "HOST", "no such device")
        patch.setattr(warping, "HOST", "no such device")
        yield


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([600, 3000]), st.sampled_from(["peaked", "ties", "never", "flat"]))
def test_an_accelerator_and_a_processor_warp_alike(seed, vocabulary, kind):
    scores = make_rows(seed, 3, vocabulary, kind)
    mass = torch.tensor(
        [clear_mass(row / 0.7, share, NEVER) for row, share in zip(scores, (0.3, 0.9, 0.99), strict=True)]
    )
    parameters = SamplingParameters(
        temperature=torch.tensor([0.7, 0.7, 0.7]),
        top_p=mass,
        top_k=torch.tensor([0, 0, 40]),
        min_p=torch.tensor([0, 0.01, 0]),
    )
    here = warp_logits(scores, parameters)
    with on_an_accelerator():
        there = warp_logits(scores, parameters)
    assert torch.equal(here, there)


class StaysOnTheDevice(TorchDispatchMode):
    """Raises if anything is carried to or from the device "meta", which stands for an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
        # A number in an expression is a tensor of the host without dimensions, passed by value.
        places = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        assert places <= {"meta"}, f"{function} touches {places}"
        return found


POLICIES = {
    "heads": {"policy": "heads"},
    "heads that see statistics": {"policy": "heads", "features": ["hidden", "statistics"]},
    "token actions": {"policy": "token_actions", "actions": [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}]},
    "sequence actions": {"policy": "sequence_actions", "actions": [{"temperature": 0.5, "top_k": 20}, {"min_p": 0.1}]},
    "static": {"policy": "static", "actions": [{"temperature": 0.7, "top_p": 0.9}]},
    "entropy": {"policy": "entropy", "entropy_rule": {"name": "edt", "temperature": 1.0, "theta": 0.5}},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_never_waits_for_an_accelerator(name, monkeypatch):
    """A meta tensor has no values, so that reading one, which is what a host waits for, raises."""
    # Autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    policy = build_policy(AutoDecoConfig(**POLICIES[name], hidden_size=16)).eval().to("meta")
    hidden, logits = torch.empty(4, 16, device="meta"), torch.empty(4, 5000, device="meta")
    remaining, samples = (torch.empty(4, dtype=torch.long, device="meta") for _ in range(2))
    with torch.no_grad(), StaysOnTheDevice():
        maxima = logits.amax(-1)
        parameters = policy(DecodeState(hidden, logits, remaining, samples, maxima=maxima))
        warped = warp_logits(logits, parameters, inplace=True, maxima=maxima)
    assert warped.shape == logits.shape


def test_reading_a_value_would_have_been_seen():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.empty(4, device="meta").any())
    with pytest.raises(AssertionError), StaysOnTheDevice():
        torch.zeros(3).to("meta")


def test_scores_may_be_overwritten_if_that_is_said():
    scores = make_rows(1, 3, 4000, "peaked")
    parameters = SamplingParameters(temperature=torch.tensor([0.5, 0.0, 2.0]), top_p=0.9)
    expected = warp_logits(scores.clone(), parameters)
    assert warp_logits(scores, parameters, inplace=True, maxima=scores.amax(-1)) is scores
    assert torch.equal(scores, expected)


def test_memory_that_is_used_again_serves_other_shapes_types_and_modes():
    parameters = SamplingParameters(temperature=0.8, top_p=0.9)
    rows = [make_rows(seed, size, vocabulary, "peaked") for seed, size, vocabulary in ((1, 2, 70001), (2, 5, 3000))]
    fresh = [warp_logits(row.double(), parameters) for row in rows]
    with torch.inference_mode():
        warp_logits(torch.randn(1, 1 << 17), parameters)
    for again, expected in zip(rows, fresh, strict=True):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(warp_logits(again.to(dtype), parameters).isneginf(), expected.isneginf())


def test_scores_that_are_part_of_something_larger_are_warped_like_any():
    scores = make_rows(2, 6, 4000, "peaked").view(2, 3, 4000)[:, -1]
    parameters = SamplingParameters(temperature=0.8, top_p=torch.tensor([0.9, 0.3]))
    expected = warp_logits(scores.clone(), parameters)
    assert torch.equal(warp_logits(scores.expand(2, 4000), parameters, inplace=True), expected)
    assert torch.equal(warp_logits(scores.t().contiguous().t(), parameters), expected)


def test_scores_of_a_model_that_builds_a_graph_are_warped_too():
    scores = make_rows(5, 2, 4000, "peaked")
    parameters = SamplingParameters(temperature=0.8, top_p=torch.tensor([0.9, 0.3]))
    found = warp_logits(scores.clone().requires_grad_(), parameters)
    assert not found.requires_grad
    assert torch.equal(found, warp_logits(scores, parameters))


def test_many_rows_are_warped_as_each_alone():
    scores = make_rows(3, 40, 60000, "peaked")  # more than fit one block
    parameters = SamplingParameters(temperature=torch.linspace(0.3, 1.5, 40), top_p=torch.linspace(0.2, 0.99, 40))
    warped = warp_logits(scores, parameters)
    for row in range(40):
        assert torch.equal(warped[row], warp_logits(scores[row : row + 1], parameters.select(torch.tensor([row])))[0])


def test_statistics_are_the_same_with_the_maxima_and_in_blocks():
    logits = make_rows(4, 40, 60000, "peaked")
    found = logit_statistics(logits)
    assert torch.equal(found, logit_statistics(logits, logits.amax(-1)))
    p = logits.double().softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    slow = torch.stack([p.amax(-1), entropy, p.square().sum(-1) - 1 / 60000, p.topk(5).values.sum(-1)], dim=-1)
    assert torch.allclose(found.double(), slow, atol=2e-6)


class TestChecksThatWait:
    """As on CUDA, where a step's values are looked at when the next one begins."""

    def test_the_step_that_was_broken_is_named_when_the_next_begins(self):
        checks, good = StepChecks(defers=True), torch.zeros(2, 9)
        checks.scores(good, 0)
        maxima = checks.scores(torch.full((2, 9), math.nan).index_fill(0, torch.tensor(0), 1.0), 1)
        assert torch.isfinite(checks.make_harmless(torch.full((2, 9), math.nan), maxima)[1]).all()
        with pytest.raises(LogitsError, match="step 1, row 1: the model's scores hold NaN"):
            checks.scores(good, 2)

    def test_the_last_step_is_looked_at_in_the_end(self):
        checks = StepChecks(defers=True)
        checks.parameters(SamplingParameters(temperature=torch.tensor([1.0, math.inf])), 7)
        with pytest.raises(LogitsError, match="step 7, row 1: the policy gave inf as temperature"):
            checks.finish()
        checks.finish()  # nothing is left

    def test_a_processor_is_told_at_once(self):
        with pytest.raises(LogitsError, match="step 3, row 0: the model's scores hold no token above -inf"):
            StepChecks().scores(torch.full((1, 4), NEVER), 3)
