"""The chunked loss against the readable one, the readable one against finite differences, and both where bugs live."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode.losses import (
    LOSS_TYPES,
    DecodingLossConfig,
    chunked_decoding_loss,
    decoding_loss_reference,
    is_easy_token,
    soft_top_p_nll,
    soft_top_p_probs,
    stable_mask_uniform,
)
from hf_adaptive_decode.losses import chunked as chunked_module
from hf_adaptive_decode.losses.config import LOSS_TYPE_NAMES
from hf_adaptive_decode.losses.ranking import TAIL_PROBABILITY

PLAIN = DecodingLossConfig(dft_weight="off", easy_token_mask_ratio=0.0)
LARGE_VOCABULARY = 151_936


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    targets: torch.Tensor,
    config: DecodingLossConfig = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, dL/dT and dL/dP per row, `[C]` each, and dL/dl `[C, V]`, by autograd through the reference in float64."""
    wide = logits.double().requires_grad_()
    wide_t = None if temperature is None else temperature.double().requires_grad_()
    wide_p = None if top_p is None else top_p.double().requires_grad_()
    losses = []
    for row in range(logits.shape[0]):
        part = slice(row, row + 1)
        losses.append(
            decoding_loss_reference(
                wide[part],
                targets[part],
                None if wide_t is None else wide_t[part],
                None if wide_p is None else wide_p[part],
                config,
            )
        )
    total = torch.stack(losses)
    zeros = torch.zeros_like(total)
    total.sum().backward()
    d_temperature = zeros if wide_t is None or wide_t.grad is None else wide_t.grad
    d_top_p = zeros if wide_p is None or wide_p.grad is None else wide_p.grad
    return total.detach(), d_temperature, d_top_p, wide.grad


def assert_rows_match(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    targets: torch.Tensor,
    tolerance: float = 2e-5,
) -> None:
    share = (torch.arange(len(targets)) % 2).float()  # to every second row's derivative that of -log softmax(l / T)_y
    rows = soft_top_p_nll(logits, temperature, top_p, targets, plain_share=share)
    loss, d_temperature, d_top_p, d_logits = oracle(logits.float(), temperature, top_p, targets)
    inverse = 1.0 if temperature is None else 1.0 / temperature.double()
    spread = (logits.float().amax(1) - logits.float().gather(1, targets[:, None])[:, 0]).double() * inverse
    # float32 resolves v = (l - max l) / T to 1e-7 of itself, and alpha = 30 multiplies what that does to c.
    scale = 1.0 + spread.abs()
    assert ((rows.loss - loss).abs() <= tolerance * scale).all(), (rows.loss, loss)
    if temperature is not None:
        assert ((rows.d_temperature - d_temperature).abs() <= 2 * tolerance * scale * inverse + 1e-30).all()
    assert ((rows.d_top_p - d_top_p).abs() <= 30 * tolerance).all(), (rows.d_top_p, d_top_p)
    d_logits = d_logits + share[:, None] * oracle(logits.float(), temperature, None, targets)[3]
    error = (rows.d_logits - d_logits).abs().sum(dim=1) / inverse
    assert (error <= 10 * tolerance * scale).all(), error


def peaked_logits(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Rows like a trained model's: a bulk, a few dozen candidates above it, one of them ahead."""
    source = generator(seed)
    logits = torch.randn(rows, vocab, generator=source) * 2.0
    likely = torch.randint(0, vocab, (rows, 40), generator=source)
    logits.scatter_(1, likely, torch.randn(rows, 40, generator=source) * 2.0 + 10.0)
    logits[torch.arange(rows), likely[:, 0]] += torch.rand(rows, generator=source) * 8.0
    return logits


# --- equations 1 to 3 ------------------------------------------------------------------------------------------------


def test_soft_top_p_probs_is_the_equations() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0], dtype=torch.float64)
    p = torch.softmax(logits / 0.7, dim=-1)
    c = torch.stack([p[1] + p[3] + p[2] + p[0], p[1], p[1] + p[3] + p[2], p[1] + p[3]])  # the tie ranks 1 before 3
    weighted = p * torch.exp(-30.0 * torch.relu(c - 0.6))
    torch.testing.assert_close(soft_top_p_probs(logits, 0.7, 0.6), weighted / weighted.sum())


def test_soft_top_p_probs_broadcasts() -> None:
    logits = torch.randn(2, 3, 11, generator=generator(0))
    temperature, top_p = torch.full((2, 3), 0.8), torch.full((2, 3), 0.9)
    probs = soft_top_p_probs(logits.bfloat16(), temperature, top_p)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, soft_top_p_probs(logits.bfloat16(), 0.8, 0.9))
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))


def test_soft_top_p_probs_gradients_match_finite_differences() -> None:
    logits = torch.randn(4, 9, generator=generator(1), dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.3, 0.8, 1.0, 1.7], dtype=torch.float64, requires_grad=True)
    top_p = torch.tensor([0.2, 0.5, 0.83, 0.97], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_top_p_probs, (logits, temperature, top_p), eps=1e-7, atol=1e-5)


def test_masked_tokens_keep_probability_zero_and_finite_gradients() -> None:
    logits = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf, 0.0]], requires_grad=True)
    temperature, top_p = torch.tensor([0.7], requires_grad=True), torch.tensor([0.6], requires_grad=True)
    probs = soft_top_p_probs(logits, temperature, top_p)
    assert probs[0, 1] == 0
    assert probs[0, 3] == 0
    probs[0, 2].backward()
    for value in (logits, temperature, top_p):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_steep_mask_is_hard_top_p() -> None:
    logits = torch.randn(50, 200, generator=generator(2), dtype=torch.float64) * 1.5
    ranked, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    hard = ranked * (ranked.cumsum(-1) <= 0.9)
    hard = torch.zeros_like(hard).scatter(-1, order, hard / hard.sum(-1, keepdim=True))
    torch.testing.assert_close(soft_top_p_probs(logits, 1.0, 0.9, alpha=1e7), hard)


def test_low_precision_error_is_that_of_the_logits() -> None:
    logits = peaked_logits(32, 3000, 3)
    rounded = logits.bfloat16()
    exact = soft_top_p_probs(logits.double(), 0.9, 0.8)
    naive = (soft_top_p_probs(rounded.double(), 0.9, 0.8) - exact).abs().amax()
    assert (soft_top_p_probs(rounded, 0.9, 0.8) - exact).abs().amax() <= naive + 1e-5
    targets = logits.argmax(-1)
    temperature, top_p = torch.full((32,), 0.9), torch.full((32,), 0.8)
    loss = oracle(logits, temperature, top_p, targets)[0]
    naive_loss = (oracle(rounded.float(), temperature, top_p, targets)[0] - loss).abs().amax()
    assert (soft_top_p_nll(rounded, temperature, top_p, targets).loss - loss).abs().amax() <= naive_loss + 1e-5


# --- rows in closed form ---------------------------------------------------------------------------------------------


def test_derivatives_match_finite_differences_of_the_reference() -> None:
    logits = torch.randn(24, 60, generator=generator(4)) * 3
    temperature = torch.rand(24, generator=generator(5)) + 0.3
    top_p = torch.rand(24, generator=generator(6)) * 0.9 + 0.05
    targets = torch.randint(0, 60, (24,), generator=generator(7))
    rows = soft_top_p_nll(logits, temperature, top_p, targets)
    step = 1e-6

    def loss(d_temperature: float, d_top_p: float) -> torch.Tensor:
        return oracle(logits, temperature.double() + d_temperature, top_p.double() + d_top_p, targets)[0]

    slope_t = (loss(step, 0) - loss(-step, 0)) / (2 * step)
    slope_p = (loss(0, step) - loss(0, -step)) / (2 * step)
    torch.testing.assert_close(rows.d_temperature.double(), slope_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.d_top_p.double(), slope_p, rtol=1e-4, atol=1e-4)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 400),
    spread=st.sampled_from([0.05, 1.0, 4.0, 20.0]),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.01, 1.2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
)
def test_rows_match_the_reference(
    seed: int, vocab: int, spread: float, temperature: float, top_p: float, dtype: torch.dtype, masked: bool
) -> None:
    source = generator(seed)
    logits = (torch.randn(5, vocab, generator=source) * spread + 3.0).to(dtype)  # bfloat16 is full of ties
    targets = torch.randint(0, vocab, (5,), generator=source)
    if masked:
        hidden = torch.rand(5, vocab, generator=source) < 0.3
        logits = logits.masked_fill(hidden.scatter(1, targets[:, None], False), -torch.inf)
    # A c_j within rounding of P may fall on either side of it, where the derivative jumps: stay clear of those.
    scaled = logits.double() / temperature
    ranked = torch.softmax(scaled, -1).sort(-1, descending=True).values.cumsum(-1)
    clear = (ranked - top_p).abs().amin(-1) > 1e-5
    if clear.any():
        many = int(clear.sum())
        assert_rows_match(
            logits[clear], torch.full((many,), temperature), torch.full((many,), top_p), targets[clear], 5e-5
        )


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.6])
def test_large_vocabulary(spread: float, temperature: float) -> None:
    logits = torch.randn(6, LARGE_VOCABULARY, generator=generator(8)) * spread
    targets = logits.argmax(-1)
    targets[3:] = torch.tensor([5, LARGE_VOCABULARY - 1, 70_000])  # all over the order, mostly in the tail
    top_p = torch.tensor([0.01, 0.5, 0.95, 0.3, 0.7, 0.99])
    assert_rows_match(logits, torch.full((6,), temperature), top_p, targets, 5e-5)


def test_large_vocabulary_peaked_with_targets_in_the_tail() -> None:
    logits = peaked_logits(8, LARGE_VOCABULARY, 9).bfloat16()
    temperature = torch.rand(8, generator=generator(10)) * 0.6 + 0.5
    top_p = torch.rand(8, generator=generator(11)) * 0.5 + 0.5
    improbable = logits.float().topk(60_000, dim=-1).indices[:, -1]
    probs = torch.softmax(logits.float() / temperature[:, None], -1)
    assert (probs.gather(1, improbable[:, None]) < TAIL_PROBABILITY).all()
    for targets in (logits.argmax(-1), improbable, torch.multinomial(probs, 1, generator=generator(12))[:, 0]):
        assert_rows_match(logits, temperature, top_p, targets)


def test_one_row_cannot_disturb_another() -> None:
    logits = torch.cat([peaked_logits(3, 5000, 13), torch.zeros(2, 5000), torch.randn(2, 5000) * 1e4])
    logits[5, 7], logits[6, 9] = 1e5, 1e5
    temperature, top_p = torch.full((7,), 0.8), torch.full((7,), 0.05)
    targets = logits.argmax(-1)
    share = torch.zeros(7)
    together = soft_top_p_nll(logits, temperature, top_p, targets, plain_share=share)
    for row in range(7):
        part = slice(row, row + 1)
        alone = soft_top_p_nll(logits[part], temperature[part], top_p[part], targets[part], plain_share=share[part])
        for field in dataclasses.fields(together):
            expected, got = vars(alone)[field.name], vars(together)[field.name][part]
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 4.1e-9])  # 4.1e-9 = 2 * sigmoid(-20)
def test_saturated_rows_stay_finite_and_right(temperature: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 9.9e3], [16.1, 0.0, -1.0, 0.5], [3.0, 3.0, -1e4, 2.999]])
    targets = torch.tensor([0, 0, 1])
    scale, top_p = torch.full((3,), temperature), torch.tensor([0.9, 0.3, 0.95])
    rows = soft_top_p_nll(logits, scale, top_p, targets, plain_share=torch.ones(3))
    for name, value in vars(rows).items():
        assert torch.isfinite(value).all(), name
    assert_rows_match(logits[:2], scale[:2], top_p[:2], targets[:2])


def test_nearly_certain_token_keeps_its_small_derivative() -> None:
    logits = torch.tensor([[16.1, 0.0]])  # p = 1 - 1e-7
    temperature, top_p, targets = torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0])
    rows = soft_top_p_nll(logits, temperature, top_p, targets)
    expected = oracle(logits, temperature, top_p, targets)[1]
    torch.testing.assert_close(rows.d_temperature.double(), expected, rtol=1e-4, atol=0)


def test_top_p_of_one_is_plain_cross_entropy() -> None:
    logits = torch.randn(16, 4000, generator=generator(14)) * 2
    targets = torch.randint(0, 4000, (16,), generator=generator(15))
    temperature = torch.rand(16, generator=generator(16)) + 0.2
    share = torch.zeros(16)
    plain = soft_top_p_nll(logits, temperature, None, targets, plain_share=share)
    for top_p in (1.0, 1.5):
        rows = soft_top_p_nll(logits, temperature, torch.full((16,), top_p), targets, plain_share=share)
        torch.testing.assert_close(rows.d_logits, plain.d_logits)
        assert torch.equal(rows.loss, plain.loss)
        assert torch.equal(rows.d_temperature, plain.d_temperature)
        assert (rows.d_top_p == 0).all()
    expected = torch.nn.functional.cross_entropy(logits / temperature[:, None], targets, reduction="none")
    torch.testing.assert_close(plain.loss, expected)
    torch.testing.assert_close(soft_top_p_nll(logits, None, None, targets).loss, -plain.base_log_prob)


def test_broken_rows_are_named() -> None:
    logits, targets, ones = torch.randn(3, 8), torch.tensor([1, 2, 3]), torch.ones(3)
    for poison in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[1, 4] = poison
        with pytest.raises(ValueError, match="logits at position 1"):
            soft_top_p_nll(broken, ones, ones, targets)
        with pytest.raises(ValueError, match="row 1"):
            soft_top_p_probs(broken, 1.0, 0.9)
    with pytest.raises(ValueError, match=r"position 2 are NaN, .inf or all -inf"):
        soft_top_p_nll(logits.index_fill(0, torch.tensor([2]), -torch.inf), ones, ones, targets)
    masked = logits.clone()
    masked[0, 1] = -torch.inf
    with pytest.raises(ValueError, match="target 1 at position 0"):
        soft_top_p_nll(masked, ones, ones, targets)
    with pytest.raises(ValueError, match=r"temperature at position 40 is 0.0"):
        soft_top_p_nll(logits, ones * 0, ones, targets, positions=torch.tensor([40, 41, 42]))
    with pytest.raises(ValueError, match="top-p at position 0 is NaN"):
        soft_top_p_nll(logits, ones, ones * torch.nan, targets)


# --- the whole loss --------------------------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """Two small heads, P seeing T, like the one that is trained."""

    def __init__(self, width: int, parameters: str = "TP") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predicted = parameters
        self.temperature = torch.nn.Linear(width, 1)
        self.top_p = torch.nn.Linear(width + 1, 1)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        temperature = 2 * torch.sigmoid(self.temperature(hidden))
        top_p = torch.sigmoid(self.top_p(torch.cat([hidden, temperature], dim=-1)))
        return (
            temperature.squeeze(-1) if "T" in self.predicted else None,
            top_p.squeeze(-1) if "P" in self.predicted else None,
        )

    def gradients(self) -> list[torch.Tensor]:
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()]
        self.zero_grad()
        return found


class Scene:
    """Hidden states, a frozen output layer, and targets of which a third are what the model would pick."""

    def __init__(self, rows: int = 60, width: int = 12, vocab: int = 97, parameters: str = "TP") -> None:
        source = generator(17)
        self.hidden = torch.randn(rows, width, generator=source)
        self.weight = torch.randn(vocab, width, generator=source)
        self.targets = torch.randint(0, vocab, (rows,), generator=source)
        self.targets[::3] = self.project(self.hidden).argmax(-1)[::3]
        self.targets[5::7] = -100
        self.uniform = torch.rand(rows, generator=source)
        self.policy = Policy(width, parameters)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return 8.0 * torch.tanh(hidden @ self.weight.t() / 8.0)  # soft-capped, as Gemma 2 does it

    def reference(self, config: DecodingLossConfig) -> torch.Tensor:
        with torch.no_grad():
            logits = self.project(self.hidden)
        temperature, top_p = self.policy(self.hidden, logits)
        uniform = self.uniform
        return decoding_loss_reference(logits, self.targets, temperature, top_p, config, mask_uniform=uniform)


Scene.project = torch.no_grad()(Scene.project)  # type: ignore[method-assign]

ALL_OPTIONS = [
    DecodingLossConfig(loss, 30.0, weight, ratio, target, detach)
    for loss, weight, (ratio, target), detach in itertools.product(
        LOSS_TYPE_NAMES, ("off", "base", "scaled"), ((0.0, "both"), (0.6, "both"), (0.6, "temperature")), (False, True)
    )
    if not (detach and loss == "end_to_end")
]


@pytest.mark.parametrize("parameters", ["TP", "T", "P"])
@pytest.mark.parametrize("config", ALL_OPTIONS, ids=lambda config: "-".join(map(str, dataclasses.astuple(config))))
def test_policy_gradients_equal_autograd_through_the_reference(config: DecodingLossConfig, parameters: str) -> None:
    scene = Scene(parameters=parameters)
    expected = scene.reference(config)
    expected.backward()
    expected_gradients = scene.policy.gradients()
    for chunk_size in (None, 1, 7):
        out = chunked_decoding_loss(
            scene.hidden, scene.targets, scene.policy, scene.project, config,
            mask_uniform=scene.uniform, chunk_size=chunk_size,
        )  # fmt: skip
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)
        for got, wanted in zip(scene.policy.gradients(), expected_gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_metrics_count_what_was_kept() -> None:
    scene = Scene()
    config = DecodingLossConfig()
    out = chunked_decoding_loss(
        scene.hidden, scene.targets, scene.policy, scene.project, config, mask_uniform=scene.uniform
    )
    logits = scene.project(scene.hidden)
    valid = scene.targets != -100
    dropped = valid & (logits.argmax(-1) == scene.targets) & (scene.uniform < 0.6)
    kept = valid & ~dropped
    assert dropped.any()
    assert (out.n_valid, out.n_kept, out.n_easy_dropped) == (valid.sum(), kept.sum(), dropped.sum())
    temperature, top_p = scene.policy(scene.hidden, logits)
    assert temperature is not None
    assert top_p is not None
    for got, wanted in (
        (out.temperature_sum, temperature), (out.temperature_square_sum, temperature**2),
        (out.top_p_sum, top_p), (out.top_p_square_sum, top_p**2),
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted[kept].double().sum())
    scaled = torch.log_softmax(logits / temperature[:, None], -1)[kept].gather(1, scene.targets[kept][:, None])
    torch.testing.assert_close(out.temperature_loss_sum, -scaled.double().sum(), rtol=1e-6, atol=1e-5)
    assert not out.temperature_loss_sum.requires_grad


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_learn_is_a_connected_zero(rows: int) -> None:
    scene = Scene()
    everything = DecodingLossConfig(easy_token_mask_ratio=1.0)
    easy = scene.project(scene.hidden).argmax(-1)
    for targets, config in ((torch.full((60,), -100), PLAIN), (easy, everything)):
        scene.policy.zero_grad()
        out = chunked_decoding_loss(
            scene.hidden[:rows], targets[:rows], scene.policy, scene.project, config, mask_uniform=scene.uniform[:rows]
        )
        assert out.loss == 0
        assert out.n_kept == 0
        out.loss.backward()
        for parameter in scene.policy.parameters():
            assert parameter.grad is not None
            assert (parameter.grad == 0).all()


def test_eight_accumulated_steps_equal_one_batch() -> None:
    scene, config = Scene(rows=64), DecodingLossConfig()
    n_valid = int((scene.targets != -100).sum())

    def backward(part: slice, items: int | torch.Tensor) -> torch.Tensor:
        out = chunked_decoding_loss(
            scene.hidden[part], scene.targets[part], scene.policy, scene.project, config,
            mask_uniform=scene.uniform[part], num_items=items,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach()

    whole = backward(slice(None), n_valid)
    whole_gradients = scene.policy.gradients()
    parts = sum(backward(slice(8 * step, 8 * step + 8), torch.tensor(n_valid)) for step in range(8))
    torch.testing.assert_close(parts, whole)
    for got, wanted in zip(scene.policy.gradients(), whole_gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_chunks_follow_the_memory_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_module, "CHUNK_BYTES", 97 * 4 * 20)
    scene, sizes = Scene(rows=80), []

    def project(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return scene.project(hidden)

    chunked_decoding_loss(scene.hidden, scene.targets, scene.policy, project, PLAIN)
    n_valid = int((scene.targets != -100).sum())  # ignored positions are never projected
    assert sum(sizes) == n_valid
    assert set(sizes[1:-1]) == {20}


def test_bad_input_is_refused_by_name() -> None:
    scene = Scene()
    hidden, targets, policy, project = scene.hidden, scene.targets, scene.policy, scene.project
    with pytest.raises(ValueError, match="mask_uniform"):
        chunked_decoding_loss(hidden, targets, policy, project)
    with pytest.raises(ValueError, match="shift the labels"):
        chunked_decoding_loss(hidden[None], targets[None], policy, project, PLAIN)
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1.*Got 0"):
        chunked_decoding_loss(hidden, targets, policy, project, PLAIN, chunk_size=0)
    with pytest.raises(ValueError, match=r"num_items.*Got 0"):
        chunked_decoding_loss(hidden, targets, policy, project, PLAIN, num_items=0)
    targets[50] = 97
    with pytest.raises(ValueError, match="target 97 at position 50 is outside the vocabulary of 97"):
        chunked_decoding_loss(hidden, targets, policy, project, PLAIN)
    with pytest.raises(ValueError, match="predict must return temperature"):
        chunked_decoding_loss(hidden[:4], targets[:4], lambda h, logits: (torch.ones(4, 1), None), project, PLAIN)
    hidden[3] = torch.nan
    with pytest.raises(ValueError, match="logits at position 3"):
        chunked_decoding_loss(hidden, targets, lambda h, logits: (None, None), project, PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "soft"}, "loss_type must be one of 'end_to_end', 'two_loss'. Got 'soft'"),
        ({"dft_weight": "on"}, "dft_weight .* Got 'on'"),
        ({"easy_token_mask_target": "top_p"}, "easy_token_mask_target .* Got 'top_p'"),
        ({"alpha": 0.0}, "alpha .* Got 0.0"),
        ({"easy_token_mask_ratio": 1.5}, r"easy_token_mask_ratio .*\[0, 1\].* Got 1.5"),
        ({"detach_temperature": True}, "detach_temperature=True with loss_type='end_to_end'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingLossConfig(**options)  # type: ignore[arg-type]


def test_loss_names_are_the_table() -> None:
    assert tuple(LOSS_TYPES) == LOSS_TYPE_NAMES


# --- easy positions --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.integers(1, 70), levels=st.integers(1, 4))
def test_easy_is_the_first_argmax(seed: int, vocab: int, levels: int) -> None:
    source = generator(seed)
    logits = torch.randint(0, levels, (9, vocab), generator=source).bfloat16()
    targets = torch.randint(0, vocab, (9,), generator=source)
    assert torch.equal(is_easy_token(logits, targets), logits.argmax(-1) == targets)


def test_mask_uniform_ignores_padding_and_company() -> None:
    ids = torch.randint(0, 1000, (6, 40), generator=generator(18))
    full = stable_mask_uniform(ids, 7)
    assert torch.equal(stable_mask_uniform(ids[2:3], 7), full[2:3])
    assert torch.equal(stable_mask_uniform(torch.nn.functional.pad(ids, (0, 9)), 7)[:, :40], full)
    assert torch.equal(stable_mask_uniform(ids.flip(0).int(), 7), full.flip(0))
    assert not torch.equal(stable_mask_uniform(ids, 8), full)
    state = torch.get_rng_state()
    stable_mask_uniform(ids, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_uniform_is_uniform_and_uncorrelated() -> None:
    # A false alarm has probability 1e-6 per check and there are 3 x 3 of them; the inputs are fixed anyway.
    rows = {
        "random": torch.randint(0, 150_000, (200, 500), generator=generator(19)),
        "constant": torch.arange(200)[:, None].expand(200, 500),
        "counting": torch.arange(200)[:, None] + torch.arange(500)[None, :],
    }
    for name, ids in rows.items():
        uniform = stable_mask_uniform(ids, 3).double()
        assert uniform.min() >= 0
        assert uniform.max() < 1
        counts = torch.histc(uniform.flatten(), bins=100, min=0, max=1)
        # The 1 - 1e-6 point of chi-square with 99 degrees of freedom.
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 181.1, name
        pairs = torch.stack([uniform[:, 1:].flatten(), uniform[:, :-1].flatten()])
        seeds = torch.stack([uniform.flatten(), stable_mask_uniform(ids, 4).double().flatten()])
        for pair in (pairs, seeds):
            correlation = torch.corrcoef(pair)[0, 1].item()
            assert abs(correlation) * pair.shape[1] ** 0.5 < 4.9, name
