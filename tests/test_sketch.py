"""Sketched rows of logits against the readable loss over all of them: values, gradients, and where bugs live."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode.losses import (
    SKETCH_FIELDS,
    DecodingLossConfig,
    chunked_decoding_loss,
    concatenated,
    decoding_loss_reference,
    is_easy_token,
    sketch_rows,
    sketched_decoding_loss,
    sketched_nll,
)
from hf_adaptive_decode.losses.config import DFT_WEIGHTS, EASY_TOKEN_MASK_TARGETS, LOSS_TYPE_NAMES
from hf_adaptive_decode.losses.sketch import KEPT

PLAIN = DecodingLossConfig(dft_weight="off", easy_token_mask_ratio=0.0)
LARGE_VOCABULARY = 151_936


def generator(seed):
    return torch.Generator().manual_seed(seed)


def reference(logits, temperature, top_p, targets):
    """Loss, dL/dT and dL/dP of each row, float64, by autograd through the equations as they read."""
    wide = logits.double()
    t, p = (None if x is None else x.double().requires_grad_() for x in (temperature, top_p))
    rows = [slice(i, i + 1) for i in range(len(targets))]
    losses = torch.stack(
        [
            decoding_loss_reference(
                wide[row], targets[row], None if t is None else t[row], None if p is None else p[row], PLAIN
            )
            for row in rows
        ]
    )
    if t is not None or p is not None:
        losses.sum().backward()
    zeros = torch.zeros(len(targets), dtype=torch.float64)
    return losses.detach(), *(zeros if x is None or x.grad is None else x.grad for x in (t, p))


def apart(found, expected):
    """The norm of the difference as a fraction of the norm."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def random_rows(count, vocab, scales, seed, dtype=torch.float32):
    g = generator(seed)
    logits = (torch.randn(count, vocab, generator=g) * scales(count, g)[:, None]).to(dtype)
    drawn = [torch.multinomial(torch.softmax(row.float(), 0), 1, generator=g) for row in logits]
    temperature = torch.rand(count, generator=g) * 1.95 + 0.05
    top_p = torch.rand(count, generator=g) * 0.95 + 0.05
    return logits, temperature, top_p, torch.cat(drawn)


def peaked(count, g):
    return torch.rand(count, generator=g) * 7.0 + 3.0


def flat(count, g):
    return torch.full((count,), 0.64)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sketch_of_realistic_logits_gives_the_loss_to_1e_4_and_1e_5_on_average(dtype):
    logits, temperature, top_p, targets = random_rows(24, LARGE_VOCABULARY, peaked, 1, dtype)
    loss, d_temperature, d_top_p = reference(logits, temperature, top_p, targets)
    rows = sketched_nll(sketch_rows(logits, targets), temperature, top_p)
    error = (rows.loss - loss).abs()
    assert error.max() < 1e-4
    assert error.mean() < 1e-5
    assert apart(rows.d_temperature, d_temperature) < 1e-3
    assert apart(rows.d_top_p, d_top_p) < 1e-3


@pytest.mark.parametrize("temperature", [0.05, 0.2, 0.5, 1.0, 2.0])
def test_a_sketch_of_flat_logits_gives_the_loss_to_3e_4(temperature):
    logits, _, top_p, targets = random_rows(6, LARGE_VOCABULARY, flat, 2)
    t = torch.full_like(top_p, temperature)
    loss, d_temperature, d_top_p = reference(logits, t, top_p, targets)
    sketch = sketch_rows(logits, targets)
    assert (sketch.place >= KEPT).any()
    rows = sketched_nll(sketch, t, top_p)
    assert (rows.loss - loss).abs().max() < 3e-4
    assert apart(rows.d_temperature, d_temperature) < 1e-3
    assert apart(rows.d_top_p, d_top_p) < 1e-3


@given(
    vocab=st.integers(1, KEPT),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 12.0),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.0, 1.2),
    alpha=st.sampled_from([1.0, 30.0, 200.0]),
)
@settings(max_examples=60)
def test_a_vocabulary_that_is_kept_whole_loses_nothing(vocab, seed, scale, temperature, top_p, alpha):
    g = generator(seed)
    # Halves tie often.
    logits = (torch.randn(3, vocab, generator=g) * scale * 2).round() / 2
    targets = torch.randint(vocab, (3,), generator=g)
    t, p = torch.full((3,), temperature), torch.full((3,), top_p)
    config = dataclasses.replace(PLAIN, alpha=alpha)
    rows = sketched_nll(sketch_rows(logits, targets), t, p, alpha)
    wide_t, wide_p = t.double().requires_grad_(), p.double().requires_grad_()
    loss = decoding_loss_reference(logits.double(), targets, wide_t, wide_p, config, num_items=1)
    loss.backward()
    size = 1.0 + float(loss.detach().abs())
    assert float(rows.loss.double().sum() - loss.detach()) == pytest.approx(0.0, abs=2e-5 * size)
    # At a kink of relu, or where a sum of mass rounds across P, either side's slope is right.
    excess = _cumulative(logits, t)[..., None] - p.double()[:, None, None]
    if excess.abs().min() > 1e-6 and top_p < 1.0:
        torch.testing.assert_close(rows.d_temperature.double(), wide_t.grad, rtol=1e-4, atol=1e-4 * size)
        torch.testing.assert_close(rows.d_top_p.double(), wide_p.grad, rtol=1e-4, atol=1e-4 * alpha / 30)


def _cumulative(logits, temperature):
    probs = torch.softmax(logits.double() / temperature.double()[:, None], dim=1)
    return probs.sort(dim=1, descending=True).values.cumsum(dim=1)


@given(
    vocab=st.integers(KEPT + 1, 3000),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.05, 12.0),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.02, 1.0),
    rounding=st.sampled_from([None, 2, 16]),
)
@settings(max_examples=40)
def test_the_error_stays_below_what_the_tails_largest_token_explains(vocab, seed, scale, temperature, top_p, rounding):
    g = generator(seed)
    logits = torch.randn(3, vocab, generator=g) * scale
    if rounding:
        logits = (logits * rounding).round() / rounding
    targets = torch.randint(vocab, (3,), generator=g)
    t, p = torch.full((3,), temperature), torch.full((3,), top_p)
    loss, *_ = reference(logits, t, p, targets)
    rows = sketched_nll(sketch_rows(logits, targets), t, p)
    # Within the tail a step is as high as its largest token at most; where P falls into it is known to half of that.
    step = torch.softmax(logits.double() / temperature, dim=1).sort(dim=1, descending=True).values[:, KEPT]
    spread = (logits.amax(1) - logits.gather(1, targets[:, None])[:, 0]).double() / temperature
    bound = 2e-4 + 2e-6 * spread + (30.0 * step).square()
    if rounding:
        # A tail of a handful of values: that each is off by up to half a bin, here 2.4e-4, does not average out.
        bound = bound + 30.0 * 0.25 * 2.4e-4 / temperature
    assert ((rows.loss - loss).abs() <= bound).all(), ((rows.loss - loss).abs(), bound)


def test_without_a_mask_and_without_a_temperature_the_plain_cross_entropy_is_left():
    logits, temperature, top_p, targets = random_rows(8, 5000, peaked, 3)
    sketch = sketch_rows(logits, targets)
    for t, p in ((temperature, None), (None, top_p), (None, None), (temperature, torch.ones(8))):
        loss, d_temperature, d_top_p = reference(logits, t, p, targets)
        rows = sketched_nll(sketch, t, p)
        torch.testing.assert_close(rows.loss.double(), loss, rtol=0, atol=3e-5)
        if t is not None:
            torch.testing.assert_close(rows.d_temperature.double(), d_temperature, rtol=1e-3, atol=1e-4)
            plain, d_plain, _ = reference(logits, t, None, targets)
            torch.testing.assert_close(rows.scaled_log_prob.double(), -plain, rtol=0, atol=2e-5)
            torch.testing.assert_close(rows.scaled_d_temperature.double(), d_plain, rtol=1e-4, atol=1e-4)
        if p is not None and (p < 1).all():
            torch.testing.assert_close(rows.d_top_p.double(), d_top_p, rtol=1e-2, atol=1e-3)
    base = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(sketch.base_log_prob.double(), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [5.0, 30.0])
def test_the_derivatives_are_those_of_the_loss_beside_them(alpha):
    # Short vocabularies, whose tails have steps high enough to matter, and P within the tail or before it.
    logits, _, _, targets = random_rows(40, 1200, lambda count, _: torch.linspace(0.1, 2.0, count), 11)
    sketch, g, width = sketch_rows(logits, targets), generator(12), 2e-3
    t, p = torch.rand(40, generator=g) * 1.2 + 0.5, torch.rand(40, generator=g) * 0.8 + 0.05
    rows = sketched_nll(sketch, t, p, alpha)
    for name, step_t, step_p in (("d_temperature", width, 0.0), ("d_top_p", 0.0, width)):
        high, low = (sketched_nll(sketch, t + s * step_t, p + s * step_p, alpha).loss.double() for s in (1, -1))
        slope = (high - low) / (2 * width)
        error = (vars(rows)[name] - slope).abs() / (1.0 + slope.abs())
        # At a kink, where c_y or a kept token's c passes P, there is no slope.
        assert error.median() < 2e-4, name
        assert error.sort().values[-8] < 2e-3, name


# --- where bugs live --------------------------------------------------------------------------------------------------


def ranks(logits, targets):
    """The target's place in a stable sort."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    return (order == targets[:, None]).long().argmax(dim=1)


@given(vocab=st.integers(2, 12_000), seed=st.integers(0, 2**31), steps=st.sampled_from([1, 8, 10_000]))
@settings(max_examples=60)
def test_the_target_is_placed_as_a_stable_sort_places_it(vocab, seed, steps):
    g = generator(seed)
    logits = (torch.randn(4, vocab, generator=g) * steps).round() / steps
    targets = torch.cat([logits[:2].argmax(1), torch.randint(vocab, (2,), generator=g)])
    sketch, rank = sketch_rows(logits, targets), ranks(logits, targets)
    kept = rank < KEPT
    assert torch.equal(sketch.place[kept].long(), rank[kept])
    assert (sketch.place[~kept] >= KEPT).all()
    assert torch.equal(sketch.easy.bool(), is_easy_token(logits, targets))
    top = logits.sort(dim=1, descending=True).values[:, :KEPT]
    torch.testing.assert_close(sketch.top[:, : top.shape[1]], top - top[:, :1], rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 1, KEPT - 2, KEPT - 1, KEPT, KEPT + 1, 700, 2999])
def test_a_target_at_any_rank_has_the_mass_above_it(place):
    g = generator(place)
    logits = torch.randn(1, 3000, generator=g) * 0.3
    target = logits.sort(dim=1, descending=True).indices[:, place]
    for value in (0.3, 1.0, 2.0):
        t, p = torch.full((1,), value), torch.tensor([0.03])
        loss, *_ = reference(logits, t, p, target)
        assert sketched_nll(sketch_rows(logits, target), t, p).loss == pytest.approx(float(loss), abs=5e-4)


@pytest.mark.parametrize("target", [0, 60, 127, 128, 129, 999])
def test_tied_tokens_rank_by_their_ids_across_the_border_of_what_is_kept(target):
    logits = torch.zeros(1, 1000)
    logits[0, 990:] = 1.0
    t, p = torch.ones(1), torch.tensor([0.001])
    loss, *_ = reference(logits, t, p, torch.tensor([target]))
    found = sketched_nll(sketch_rows(logits, torch.tensor([target])), t, p)
    assert found.loss == pytest.approx(float(loss), abs=1e-3)


@pytest.mark.parametrize("finite", [1, 5, KEPT - 1, KEPT, KEPT + 1, 900])
def test_tokens_of_logit_minus_infinity_have_no_mass(finite):
    g = generator(finite)
    logits = torch.full((4, 6000), -torch.inf)
    ids = torch.stack([torch.randperm(6000, generator=g)[:finite] for _ in range(4)])
    logits.scatter_(1, ids, torch.randn(4, finite, generator=g) * 2)
    targets = ids[:, -1]
    t, p = torch.full((4,), 0.9), torch.full((4,), 0.8)
    loss, d_temperature, _ = reference(logits, t, p, targets)
    rows = sketched_nll(sketch_rows(logits, targets), t, p)
    torch.testing.assert_close(rows.loss.double(), loss, rtol=0, atol=2e-4)
    torch.testing.assert_close(rows.d_temperature.double(), d_temperature, rtol=2e-3, atol=2e-3)


def test_extreme_parameters_give_finite_numbers():
    logits, _, _, targets = random_rows(4, 4000, peaked, 4)
    sketch = sketch_rows(logits, targets)
    for t, p in itertools.product((1e-7, 1e-3, 2.0), (-0.1, 0.0, 1e-6, 1.0, 1.5)):
        rows = sketched_nll(sketch, torch.full((4,), t), torch.full((4,), p))
        for name in ("loss", "d_temperature", "d_top_p"):
            assert torch.isfinite(vars(rows)[name]).all(), (t, p, name)


def test_what_a_sketch_cannot_answer_is_refused():
    logits, temperature, top_p, targets = random_rows(2, 300, peaked, 5)
    sketch = sketch_rows(logits, targets)
    for bad in (2.1, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"position 1 .*up to 2"):
            sketched_nll(sketch, torch.tensor([1.0, bad]), top_p)
    with pytest.raises(ValueError, match=r"position 0 is NaN"):
        sketched_nll(sketch, temperature, torch.tensor([math.nan, 0.5]))


def test_a_sketch_does_not_depend_on_its_neighbours_or_on_autocast():
    logits, _, _, targets = random_rows(40, 9000, peaked, 6)
    whole = sketch_rows(logits, targets)
    parts = concatenated([sketch_rows(logits[i : i + 7], targets[i : i + 7]) for i in range(0, 40, 7)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = sketch_rows(logits, targets)
    for name, (dtype, shape) in SKETCH_FIELDS.items():
        found = vars(whole)[name]
        assert (found.dtype, tuple(found.shape)) == (dtype, (40, *shape))
        torch.testing.assert_close(vars(parts)[name], found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vars(low)[name], found, rtol=1e-5, atol=1e-5)


def test_a_position_takes_less_than_a_kilobyte():
    assert sum(dtype.itemsize * math.prod(shape) for dtype, shape in SKETCH_FIELDS.values()) == 931


# --- the whole loss ---------------------------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """T and P from the hidden state, or `None` for one of them."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.weight = torch.nn.Parameter(torch.randn(2, 16, generator=generator(9)) * 0.3)

    def forward(self, hidden, _logits):
        both = (hidden.float() @ self.weight.t()).sigmoid()
        temperature, top_p = 2 * both[:, 0], both[:, 1]
        return (temperature if "t" in self.heads else None), (top_p if "p" in self.heads else None)


CONFIGS = [
    DecodingLossConfig(loss_type=loss, dft_weight=weight, easy_token_mask_target=target, detach_temperature=detach)
    for loss, weight, target, detach in itertools.product(
        LOSS_TYPE_NAMES, DFT_WEIGHTS, EASY_TOKEN_MASK_TARGETS, (False, True)
    )
    if not (detach and loss == "end_to_end")
]


@pytest.mark.parametrize("heads", ["tp", "t", "p"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.dft_weight}-{c.easy_token_mask_target}")
def test_every_option_means_what_it_means_with_logits(config, heads):
    g = generator(7)
    hidden, output_layer = torch.randn(50, 16, generator=g), torch.randn(900, 16, generator=g)
    logits = hidden @ output_layer.t()
    targets = torch.cat([logits[:30].argmax(1), torch.randint(900, (20,), generator=g)])
    uniform = torch.rand(50, generator=g)
    results = []
    for sketched in (False, True):
        policy = Policy(heads)
        how = {"mask_uniform": uniform, "num_items": 64, "chunk_size": 17}
        if sketched:
            found = sketched_decoding_loss(hidden, sketch_rows(logits, targets), policy, config, **how)
        else:
            found = chunked_decoding_loss(hidden, targets, policy, lambda h: h @ output_layer.t(), config, **how)
        found.loss.backward()
        results.append((found, policy.weight.grad))
    (exact, exact_grad), (near, near_grad) = results
    assert (near.n_valid, near.n_kept, near.n_easy_dropped) == (exact.n_valid, exact.n_kept, exact.n_easy_dropped)
    assert exact.n_easy_dropped > 0
    for name in ("loss", "temperature_sum", "top_p_square_sum", "temperature_loss_sum", "top_p_loss_sum"):
        torch.testing.assert_close(vars(near)[name], vars(exact)[name], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(near_grad, exact_grad, rtol=2e-3, atol=2e-5)


def test_no_position_gives_a_zero_that_reaches_the_policy():
    policy = Policy("tp")
    sketch = sketch_rows(torch.randn(1, 40), torch.tensor([3]))
    found = sketched_decoding_loss(torch.randn(0, 16), sketch[:0], policy, PLAIN)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert (policy.weight.grad == 0).all()


def test_observers_see_every_position_once_and_in_order():
    g = generator(8)
    hidden, output_layer = torch.randn(30, 16, generator=g), torch.randn(200, 16, generator=g)
    targets = torch.randint(200, (30,), generator=g)
    targets[::4] = -100
    seen = []
    chunked_decoding_loss(
        hidden, targets, Policy("tp"), lambda h: h @ output_layer.t(), mask_uniform=torch.zeros(30), chunk_size=4,
        observe=lambda logits, own: seen.append((logits.clone(), own)),
    )  # fmt: skip
    valid = targets != -100
    assert torch.equal(torch.cat([own for _, own in seen]), targets[valid])
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), hidden[valid] @ output_layer.t())
