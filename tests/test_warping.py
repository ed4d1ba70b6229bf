"""`warp_logits` against transformers' own warpers, row by row, and its promises where transformers has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_adaptive_decode import SamplingParameters
from hf_adaptive_decode.errors import AdaptiveDecodeError, SamplingParameterError
from hf_adaptive_decode.warping import warp_logits

NEVER = -math.inf
EVERY_PARAMETER = ("temperature", "top_k", "top_p", "min_p")
NO_OPS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# A sum of V fp32 probabilities may land on the other side of a boundary that is this close.
MASS_TOLERANCE = 2e-5


def transformers_warpers(temperature=None, top_k=None, top_p=None, min_p=None) -> LogitsProcessorList:
    """What transformers puts into a sampling call for these settings, in the order documented for ours."""
    chain = LogitsProcessorList()
    if temperature is not None and temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    return chain


def kept_scores(row: torch.Tensor) -> torch.Tensor:
    """Sorted, because which of two equal tokens `torch.sort` puts first is not defined."""
    return row[row > NEVER].sort().values


def is_on_a_boundary(logits: torch.Tensor, expected: int, found: int, settings: dict) -> bool:
    """Whether both numbers of survivors are right up to the rounding of one fp32 sum."""
    scores = logits.double() / (settings.get("temperature") or 1.0)
    order = scores.sort(descending=True).values
    order = order[order > NEVER]
    if settings.get("top_k"):
        order = order[order >= order[min(settings["top_k"], len(order)) - 1]]
    p = order.softmax(-1)
    few, many = sorted((expected, found))
    near = []
    if settings.get("top_p") is not None:
        ahead = p.cumsum(-1) - p
        near.append((ahead[few:many] - settings["top_p"]).abs().lt(MASS_TOLERANCE).all())
    if settings.get("min_p"):
        near.append((p[few:many] / p[0] - settings["min_p"]).abs().lt(MASS_TOLERANCE).all())
    return any(map(bool, near))


def assert_same_as_transformers(logits: torch.Tensor, rows: list[dict], warped: torch.Tensor) -> None:
    assert warped.dtype == torch.float32
    for index, row_settings in enumerate(rows):
        expected = transformers_warpers(**row_settings)(None, logits[index : index + 1].float())[0]
        want, got = kept_scores(expected), kept_scores(warped[index])
        if len(want) == len(got):
            assert torch.allclose(want, got, rtol=1e-5, atol=1e-5), (index, row_settings)
        else:
            assert is_on_a_boundary(logits[index], len(want), len(got), row_settings), (index, row_settings)
        # The survivors are a set of tokens of highest score: none of them lies below a dropped one.
        scores = logits[index].float()
        if len(got) < len(scores):
            assert scores[warped[index] > NEVER].min() >= scores[warped[index] == NEVER].max()


def as_parameters(rows: list[dict]) -> SamplingParameters:
    dtypes = {"top_k": torch.long}
    return SamplingParameters(
        **{
            name: torch.tensor([row.get(name, NO_OPS[name]) for row in rows], dtype=dtypes.get(name, torch.float32))
            for name in EVERY_PARAMETER
            if any(name in row for row in rows)
        }
    )


def rounded_logits(seed: int, rows: int, vocabulary: int, spread: float, with_ties: bool, with_never: bool):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    if with_ties:
        logits = logits.mul(2).round().div(2)
    if with_never:
        gone = torch.rand(rows, vocabulary, generator=generator) < 0.4
        gone.scatter_(1, logits.argmax(-1, keepdim=True), False)
        logits = logits.masked_fill(gone, NEVER)
    return logits


any_logits = st.builds(
    rounded_logits,
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    # Either side of each stage of the nucleus search (128, 2048), and beyond both.
    vocabulary=st.sampled_from([2, 3, 5, 17, 127, 128, 129, 300, 2047, 2049, 5000]),
    spread=st.sampled_from([0.01, 1.0, 3.0, 12.0]),
    with_ties=st.booleans(),
    with_never=st.booleans(),
)


def thousandths(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers that are the same in fp32 and as a Python float, so that both sides are given one value."""
    return st.integers(low, high).map(lambda n: float(np.float32(n / 1000)))


temperatures, top_ps, min_ps = thousandths(50, 3000), thousandths(10, 999), thousandths(1, 990)
top_ks = st.integers(1, 6000)
one_setting = st.fixed_dictionaries(
    {}, optional={"temperature": temperatures, "top_k": top_ks, "top_p": top_ps, "min_p": min_ps}
)


@settings(deadline=None, max_examples=200)
@given(any_logits, st.data())
def test_rows_with_settings_of_their_own_equal_transformers(logits, data):
    rows = data.draw(st.lists(one_setting, min_size=len(logits), max_size=len(logits)))
    assert_same_as_transformers(logits, rows, warp_logits(logits, as_parameters(rows)))


@settings(deadline=None, max_examples=120)
@given(any_logits, one_setting)
def test_scalars_equal_transformers(logits, setting):
    warped = warp_logits(logits, SamplingParameters(**setting))
    assert_same_as_transformers(logits, [setting] * len(logits), warped)


@pytest.mark.parametrize("name", EVERY_PARAMETER)
@settings(deadline=None, max_examples=40)
@given(logits=any_logits, data=st.data())
def test_each_parameter_alone_equals_transformers(name, logits, data):
    value = data.draw({"temperature": temperatures, "top_k": top_ks, "top_p": top_ps, "min_p": min_ps}[name])
    rows = [{name: value}] * len(logits)
    assert_same_as_transformers(logits, rows, warp_logits(logits, as_parameters(rows)))


@pytest.mark.parametrize("vocabulary", [2, 100, 2000, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.995])
def test_flat_rows_reach_every_stage_of_the_nucleus_search(vocabulary, top_p):
    logits = rounded_logits(3, 3, vocabulary, 0.05, with_ties=False, with_never=False)
    warped = warp_logits(logits, SamplingParameters(top_p=top_p))
    kept = (warped > NEVER).sum(-1)
    assert (kept.float() / vocabulary - top_p).abs().max() < 0.05 + 1 / vocabulary
    assert_same_as_transformers(logits, [{"top_p": top_p}] * 3, warped)


# With 256 and 4096 and half of the mass, the nucleus ends exactly where a stage of the search does.
@pytest.mark.parametrize("vocabulary", [4, 128, 129, 256, 3000, 4096])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.8])
def test_the_nucleus_of_all_equal_tokens_has_the_size_transformers_gives_it(vocabulary, top_p):
    logits = torch.zeros(2, vocabulary)
    expected = transformers_warpers(top_p=top_p)(None, logits)
    found = warp_logits(logits, SamplingParameters(top_p=top_p))
    # fp32 sums of V equal numbers may end one token apart.
    assert ((expected > NEVER).sum(-1) - (found > NEVER).sum(-1)).abs().max() <= 1


def test_peaked_and_flat_rows_in_one_batch_each_find_their_nucleus():
    logits = torch.cat([torch.randn(2, 5000) * 20, torch.randn(2, 5000) * 0.01, torch.randn(2, 5000) * 2])
    rows = [{"top_p": p} for p in (0.9, 0.2, 0.9, 0.001, 0.97, 0.5)]
    assert_same_as_transformers(logits, rows, warp_logits(logits, as_parameters(rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_warped_in_at_least_fp32(dtype):
    logits = rounded_logits(5, 4, 400, 3.0, with_ties=False, with_never=True).to(dtype)
    rows = [{"temperature": 0.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02}] * 4
    warped = warp_logits(logits, as_parameters(rows))
    assert warped.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_as_transformers(logits.float(), rows, warped.float())


def test_fp16_logits_at_the_end_of_their_range_do_not_overflow():
    logits = torch.tensor([[65504.0, 65440.0, -65504.0, NEVER]], dtype=torch.float16)
    warped = warp_logits(logits, SamplingParameters(temperature=torch.tensor([0.01])))
    assert torch.isfinite(warped[0, :3]).all()
    assert warped[0, 3] == NEVER


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_a_huge_temperature_flattens_and_never_makes_nan(temperature):
    logits = torch.tensor([[3.0, NEVER, 1.0]])
    warped = warp_logits(logits, SamplingParameters(temperature=temperature))
    assert not warped.isnan().any()
    assert warped[0, 1] == NEVER
    assert torch.allclose(warped.softmax(-1), torch.tensor([[0.5, 0.0, 0.5]]))


@settings(deadline=None, max_examples=150)
@given(any_logits, st.data())
def test_something_survives_and_what_was_forbidden_stays_so(logits, data):
    row = st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.one_of(st.sampled_from([0.0, 1e-30, 1e-6]), thousandths(0, 10**5)),
            "top_k": st.integers(0, 10**6),
            "top_p": st.one_of(st.sampled_from([0.0, 1e-30]), thousandths(0, 1000)),
            "min_p": thousandths(0, 1000),
        },
    )
    rows = data.draw(st.lists(row, min_size=len(logits), max_size=len(logits)))
    warped = warp_logits(logits, as_parameters(rows))
    assert (warped > NEVER).any(-1).all()
    assert not warped.isnan().any()
    assert not warped.isposinf().any()
    assert (warped[logits == NEVER] == NEVER).all()
    # Whatever goes, a token of the highest logit stays (which one of equals is not said).
    assert torch.equal(logits.masked_fill(warped == NEVER, NEVER).amax(-1), logits.amax(-1))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_narrowest_setting_leaves_the_most_likely_token(setting, per_row):
    logits = torch.randn(5, 300)
    parameters = as_parameters([setting] * 5) if per_row else SamplingParameters(**setting)
    warped = warp_logits(logits, parameters)
    assert (warped > NEVER).sum(-1).tolist() == [1] * 5
    assert torch.equal(warped.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0, torch.tensor(0.0), torch.zeros(1), torch.zeros(1, dtype=torch.long)])
def test_temperature_zero_keeps_the_first_of_tied_tokens(temperature):
    warped = warp_logits(torch.tensor([[1.0, 4.0, 4.0, 0.0]]), SamplingParameters(temperature=temperature))
    assert warped.tolist() == [[NEVER, 4.0, NEVER, NEVER]]


def test_temperature_zero_beats_every_other_parameter():
    logits = torch.randn(4, 50)
    parameters = SamplingParameters(torch.zeros(4), torch.full((4,), 7), torch.full((4,), 0.3), torch.full((4,), 0.1))
    assert torch.equal(warp_logits(logits, parameters), warp_logits(logits, SamplingParameters(temperature=0.0)))


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.randn(3, 40)
    warped = warp_logits(logits, SamplingParameters(temperature=torch.tensor([0.0, 0.5, 0.0])))
    assert (warped > NEVER).sum(-1).tolist() == [1, 40, 1]
    assert torch.allclose(warped[1], logits[1] / 0.5)


@pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-45])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_vanishing_temperature_is_greedy_on_separated_logits(temperature, per_row):
    logits = torch.stack([torch.randperm(200).float() for _ in range(6)]) * 0.1
    value = torch.full((6,), temperature) if per_row else temperature
    probabilities = warp_logits(logits, SamplingParameters(temperature=value)).softmax(-1)
    assert not probabilities.isnan().any()
    assert torch.equal(probabilities, torch.nn.functional.one_hot(logits.argmax(-1), 200).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_breaks_down_never_makes_nan_scores(value):
    logits = torch.randn(2, 20)
    parameters = SamplingParameters(temperature=torch.tensor([value, 0.5]), top_p=torch.tensor([value, 0.5]))
    try:
        warped = warp_logits(logits, parameters)
    except AdaptiveDecodeError:
        return
    assert not warped.isnan().any()
    assert (warped > NEVER).any(-1).all()


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(),
        SamplingParameters(**NO_OPS),
        SamplingParameters(**{k: torch.full((3,), v) for k, v in NO_OPS.items()}),
        SamplingParameters(**{k: torch.tensor(v) for k, v in NO_OPS.items()}),
    ],
    ids=["none", "scalars", "rows", "zero-dimensional tensors"],
)
@pytest.mark.parametrize("vocabulary", [2, 130, 5000])
def test_everything_off_changes_no_bit(parameters, vocabulary):
    logits = rounded_logits(1, 3, vocabulary, 2.0, with_ties=True, with_never=True)
    assert torch.equal(warp_logits(logits, parameters), logits)


@pytest.mark.parametrize("top_k", [96, 97, 10**9])
def test_top_k_of_the_vocabulary_or_more_changes_no_bit(top_k):
    logits = torch.randn(2, 96)
    assert torch.equal(warp_logits(logits, SamplingParameters(top_k=top_k)), logits)
    assert torch.equal(warp_logits(logits, SamplingParameters(top_k=torch.full((2,), top_k))), logits)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_ties", [False, True])
def test_no_input_is_modified(temperature, with_ties):
    logits = rounded_logits(2, 4, 300, 1.0, with_ties=with_ties, with_never=True)
    rows = [{"temperature": temperature, "top_k": 50, "top_p": 0.4, "min_p": 0.1}] * 4
    parameters = as_parameters(rows)
    before = logits.clone(), {k: v.clone() for k, v in vars(parameters).items() if v is not None}
    warp_logits(logits, parameters)
    assert torch.equal(logits, before[0])
    assert all(torch.equal(vars(parameters)[name], value) for name, value in before[1].items())


def test_inference_tensors_are_warped_too():
    with torch.inference_mode():
        logits = torch.zeros(2, 300)
        warped = warp_logits(logits, SamplingParameters(top_p=torch.tensor([0.5, 0.2])))
    assert (warped > NEVER).sum(-1).sub(torch.tensor([150, 60])).abs().max() <= 1


@settings(deadline=None, max_examples=60)
@given(any_logits, st.data())
def test_permuting_rows_permutes_the_result(logits, data):
    rows = data.draw(st.lists(one_setting, min_size=len(logits), max_size=len(logits)))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    permuted = warp_logits(logits[order], as_parameters([rows[i] for i in order]))
    assert torch.equal(permuted, warp_logits(logits, as_parameters(rows))[order])


@settings(deadline=None, max_examples=40)
@given(any_logits, st.data())
def test_a_row_is_warped_the_same_alone_as_in_a_batch(logits, data):
    rows = data.draw(st.lists(one_setting, min_size=len(logits), max_size=len(logits)))
    together = warp_logits(logits, as_parameters(rows))
    alone = [warp_logits(logits[i : i + 1], as_parameters(rows[i : i + 1])) for i in range(len(rows))]
    assert torch.equal(torch.cat(alone), together)


def test_an_empty_batch_stays_empty():
    assert warp_logits(torch.zeros(0, 7), SamplingParameters(temperature=0.5, top_p=0.5)).shape == (0, 7)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", "0.7", "finite number"),
        ("temperature", True, "finite number"),
        ("top_k", -1, "whole number"),
        ("top_k", 2.5, "whole number"),
        ("top_k", math.nan, "whole number"),
        ("top_k", math.inf, "whole number"),
        ("top_p", -0.01, "between 0 and 1"),
        ("top_p", 1.01, "between 0 and 1"),
        ("top_p", math.nan, "between 0 and 1"),
        ("min_p", -1, "between 0 and 1"),
        ("min_p", 2, "between 0 and 1"),
        ("min_p", "a lot", "between 0 and 1"),
    ],
)
def test_a_scalar_out_of_range_is_refused_with_value_and_range(name, value, allowed):
    with pytest.raises(SamplingParameterError) as caught:
        warp_logits(torch.zeros(1, 4), SamplingParameters(**{name: value}))
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)
    assert isinstance(caught.value, AdaptiveDecodeError)
    assert isinstance(caught.value, ValueError)


def test_numpy_scalars_are_numbers():
    logits = torch.randn(2, 30)
    expected = warp_logits(logits, SamplingParameters(temperature=0.5, top_k=3))
    found = warp_logits(logits, SamplingParameters(temperature=np.float64(0.5), top_k=np.int64(3)))
    assert torch.equal(found, expected)


def test_samples_have_the_frequencies_of_the_truncated_distribution():
    """Pearson's statistic over 20,000 draws and 5 tokens; above 33.4 with probability 1e-6 if the warp is right."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, NEVER]])
    temperature, draws = 1.5, 20_000
    warped = warp_logits(logits, SamplingParameters(temperature=temperature, top_k=6, top_p=0.9))
    mass = torch.softmax(logits[0].double()[:6] / temperature, -1)
    # 0.42, 0.22, 0.15, 0.11, 0.08 | 0.06: the sixth token lies outside of the nucleus.
    assert mass.cumsum(-1)[3] < 0.9 < mass.cumsum(-1)[4]
    expected = mass[:5] / mass[:5].sum() * draws
    drawn = torch.multinomial(warped.softmax(-1)[0], draws, replacement=True).bincount(minlength=8)
    assert drawn[5:].sum() == 0
    assert float(((drawn[:5] - expected) ** 2 / expected).sum()) < 33.4
