"""Controls that an adapter's gain is held against: its own choices shuffled, halved, searched for, and taken apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, DecodeState, SamplingParameters
from hf_adaptive_decode.engines.transformers import complete, encode_prompt
from hf_adaptive_decode.evaluation.ablation import only
from hf_adaptive_decode.evaluation.decomposition import PARTS, decompose
from hf_adaptive_decode.evaluation.likelihood import text_likelihood
from hf_adaptive_decode.evaluation.metrics import bootstrap_interval
from hf_adaptive_decode.evaluation.search import expert_search, measure_entropies, turn_temperature
from hf_adaptive_decode.evaluation.shuffle import ShuffledPolicy, shuffled
from hf_adaptive_decode.evaluation.tokens import TokenTable, token_table
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

BUDGET = 20


@pytest.fixture(scope="module")
def testbed():
    """An adaptive model whose temperature and top-p change strongly, its tokenizer, and prompts."""
    model = tiny.randomise_heads(AutoDecoForCausalLM.from_base(load_base_model()))
    return model, load_tokenizer(), [row["prompt"] for row in build_problems("validation", 12)]


@pytest.fixture(scope="module")
def written(testbed):
    """What its adapter wrote, and the table of that."""
    model, tokenizer, prompts = testbed
    found = complete(model, tokenizer, prompts, samples=4, token_budget=BUDGET)
    return token_table(model, tokenizer, prompts, found)


def blank(rows: int, **known) -> DecodeState:
    return DecodeState(torch.zeros(rows, 4), **known)


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tuples(parameters: SamplingParameters, names=("temperature", "top_p")) -> list[tuple[float, ...]]:
    return list(zip(*(vars(parameters)[name].tolist() for name in names), strict=True))


def with_entropy(entropies: torch.Tensor, vocabulary: int = 64) -> torch.Tensor:
    """Logits whose entropies are these, by bisection: one token against the equally likely rest."""
    low, high = torch.zeros_like(entropies, dtype=torch.float64), torch.full_like(entropies, 60.0, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        logits = torch.nn.functional.pad(middle[:, None], (0, vocabulary - 1))
        too_flat = torch.distributions.Categorical(logits=logits).entropy() > entropies
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return torch.nn.functional.pad(middle[:, None], (0, vocabulary - 1)).float()


# --- shuffle ----------------------------------------------------------------------------------------------------------


def test_equally_spaced_uniforms_give_every_recorded_tuple_once(testbed, written):
    control = shuffled(testbed[0].decoding_adapter, written)
    rows = len(written)
    found = control(blank(rows, uniform=(torch.arange(rows, dtype=torch.float64) + 0.5) / rows))
    recorded = list(zip(written.temperature.tolist(), written.top_p.tolist(), strict=True))
    assert sorted(tuples(found)) == sorted(recorded)
    assert (found.top_k, found.min_p, found.action) == (None, None, None)
    assert not control.needs_logits
    assert not control.decides_once


def test_a_shuffle_keeps_the_distribution_of_temperatures(testbed, written):
    """20,000 draws: by the DKW bound the distribution functions differ by 0.02 with odds below 3e-7."""
    found = shuffled(testbed[0].decoding_adapter, written)(blank(20_000, uniform=uniforms(20_000)))
    drawn, recorded = np.sort(found.temperature.numpy()), np.sort(written.temperature)
    assert recorded.std() > 0.2
    grid = np.concatenate([drawn, recorded])
    gaps = [np.searchsorted(one, grid, side="right") / len(one) for one in (drawn, recorded)]
    assert np.abs(gaps[0] - gaps[1]).max() < 0.02


def test_bins_keep_the_distribution_of_temperatures_at_each_level_of_entropy(testbed, written):
    """4 bins, 5,000 draws each: by the DKW bound any of them differs by 0.04 with odds below 1e-6."""
    control = shuffled(testbed[0].decoding_adapter, written, bins=4)
    assert control.needs_logits
    edges = [-1.0, *np.quantile(written.entropy, [0.25, 0.5, 0.75], method="inverted_cdf"), math.inf]
    means = []
    for low, high in itertools.pairwise(edges):
        inside = (written.entropy > low) & (written.entropy <= high)
        # Well within the bin, as fp32 gives an entropy its last digits by how it was computed.
        middle = torch.tensor([np.median(written.entropy[inside])], dtype=torch.float64)
        logits = with_entropy(middle, 116).expand(5_000, -1)
        found = control(blank(5_000, logits=logits, uniform=uniforms(5_000)))
        drawn, recorded = np.sort(found.temperature.numpy()), np.sort(written.temperature[inside])
        grid = np.concatenate([drawn, recorded])
        gaps = [np.searchsorted(one, grid, side="right") / len(one) for one in (drawn, recorded)]
        assert np.abs(gaps[0] - gaps[1]).max() < 0.04
        means.append(recorded.mean())
    assert np.ptp(means) > 0.05  # so that bins are something else than no bins


@settings(max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.7, 1.5, 1.6, 3.0]), min_size=1, max_size=25), st.integers(1, 9))
def test_every_draw_is_from_the_bin_of_its_entropy_whatever_the_ties(entropies, bins):
    recorded = torch.tensor(entropies)
    names = torch.arange(len(entropies), dtype=torch.float32)
    control = ShuffledPolicy(SamplingParameters(temperature=names), recorded, bins)
    values = sorted(set(entropies))
    # Of each value, all that is ever drawn at it.
    logits = with_entropy(torch.tensor(values, dtype=torch.float64)).repeat_interleave(200, 0)
    even = ((torch.arange(200, dtype=torch.float64) + 0.5) / 200).repeat(len(values))
    drawn = control(blank(len(even), logits=logits, uniform=even)).temperature.long().reshape(len(values), 200)
    pools = [set(row.tolist()) for row in drawn]
    for value, pool in zip(values, pools, strict=True):
        # Ties lie together, a bin is an interval, and no recorded token is left out of the bin that it is in.
        assert {i for i, e in enumerate(entropies) if e == value} <= pool
        low, high = min(entropies[i] for i in pool), max(entropies[i] for i in pool)
        assert {i for i, e in enumerate(entropies) if low <= e <= high} == pool
    sizes = [len(pool) for pool in {frozenset(pool) for pool in pools}]
    assert sum(sizes) == len(entropies)
    assert len(sizes) <= bins
    if len(values) == len(entropies) and len(entropies) % bins == 0:
        assert sizes == [len(entropies) // bins] * bins


def test_an_entropy_beyond_all_recorded_ones_falls_into_the_nearest_bin():
    control = ShuffledPolicy(SamplingParameters(temperature=torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]), 2)
    logits = with_entropy(torch.tensor([0.0, 3.9], dtype=torch.float64))
    found = control(blank(2, logits=logits, uniform=torch.tensor([0.999, 0.001], dtype=torch.float64)))
    assert found.temperature.tolist() == [1.0, 2.0]


def test_the_largest_uniform_there_is_draws_a_recorded_token():
    control = ShuffledPolicy(SamplingParameters(temperature=torch.arange(3.0)))
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert control(blank(1, uniform=last)).temperature.tolist() == [2.0]


def test_without_uniforms_a_shuffle_follows_torchs_seed():
    control = ShuffledPolicy(SamplingParameters(temperature=torch.arange(100.0)))
    torch.manual_seed(5)
    first = control(blank(50)).temperature
    torch.manual_seed(5)
    assert torch.equal(control(blank(50)).temperature, first)
    assert len(set(first.tolist())) > 20


@pytest.mark.parametrize("bins", [None, 3])
def test_a_shuffles_completions_take_recorded_tuples_whatever_the_batch(testbed, written, bins):
    model, tokenizer, prompts = testbed
    control = shuffled(model.decoding_adapter, written, bins)
    how = {"policy": control, "samples": 3, "token_budget": BUDGET, "seed": 7}
    found = complete(model, tokenizer, prompts, **how)
    recorded = set(zip(written.temperature.tolist(), written.top_p.tolist(), strict=True))
    for group, again in zip(found, complete(model, tokenizer, prompts, **how, batch_rows=5), strict=True):
        for one, other in zip(group, again, strict=True):
            assert one.token_ids == other.token_ids
            assert one.temperature.tolist() == other.temperature.tolist()
            assert set(zip(one.temperature.tolist(), one.top_p.tolist(), strict=True)) <= recorded
    other_seed = complete(model, tokenizer, prompts, **{**how, "seed": 8})
    assert [one.token_ids for one in found[0]] != [one.token_ids for one in other_seed[0]]


def test_a_shuffle_forgets_which_token_a_temperature_was_for_and_bins_remember_its_entropy(testbed):
    # T follows the entropy alone, so without bins the two have nothing to do with each other any more: their
    # correlation over some 1,500 tokens is then within 0.15 but for odds below 1e-6.
    model, tokenizer, prompts = testbed
    rule = {"name": "dynatemp", "low": 0.4, "high": 2.0}
    policy = build_policy(AutoDecoConfig(policy="entropy", entropy_rule=rule))
    how = {"samples": 12, "token_budget": BUDGET}

    def table(decider) -> TokenTable:
        return token_table(model, tokenizer, prompts, complete(model, tokenizer, prompts, policy=decider, **how))

    def correlation(found: TokenTable) -> float:
        return float(np.corrcoef(found.entropy, found.temperature)[0, 1])

    own = table(policy)
    assert correlation(own) > 0.99
    assert abs(correlation(table(shuffled(policy, own)))) < 0.15
    assert correlation(table(shuffled(policy, own, bins=8))) > 0.7


def action_table(action, temperature, top_p, entropy=None, position=None) -> TokenTable:
    rows = len(action)
    zeros = np.zeros(rows, dtype=np.int64)
    return TokenTable(
        problem=zeros,
        sample=zeros,
        position=zeros if position is None else np.array(position),
        token_id=zeros,
        temperature=np.array(temperature, dtype=np.float32),
        top_p=np.array(top_p, dtype=np.float32),
        action=np.array(action, dtype=np.int64),
        entropy=np.zeros(rows, dtype=np.float32) if entropy is None else np.array(entropy, dtype=np.float32),
        probability=np.ones(rows, dtype=np.float32),
        top_ids=zeros[:, None],
        top_probabilities=np.ones((rows, 1), dtype=np.float32),
    )


ACTIONS = [{"temperature": 0.5, "top_k": 3}, {"temperature": 1.5, "min_p": 0.25}, {"temperature": 1.0, "top_p": 0.5}]
ALL = ("temperature", "top_p", "top_k", "min_p")


def every_tuple(control, rows: int) -> list[tuple[float, ...]]:
    even = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return sorted(tuples(control(blank(rows, uniform=even)), ALL))


def action_policy(**given):
    settings = {"policy": "token_actions", "actions": ACTIONS, "hidden_size": 4, "budget_features": []}
    return build_policy(AutoDecoConfig(**{**settings, **given})).eval()


def test_actions_are_shuffled_with_all_of_their_parameters():
    table = action_table([1, 0, 2, 1], [1.5, 0.5, 1.0, 1.5], [1, 1, 0.5, 1])
    expected = [(0.5, 1, 3, 0), (1.0, 0.5, 0, 0), (1.5, 1, 0, 0.25), (1.5, 1, 0, 0.25)]
    assert every_tuple(shuffled(action_policy(), table), 4) == expected


def test_a_masked_token_is_shuffled_as_the_greedy_one_that_it_was():
    table = action_table([-1, 1], [0.0, 1.5], [1, 1])
    found = every_tuple(shuffled(action_policy(max_prob_mask=0.9), table), 2)
    assert [one[0] for one in found] == [0.0, 1.5]
    assert found[1] == (1.5, 1, 0, 0.25)


def test_a_masked_token_is_shuffled_as_the_priors_favourite_that_it_was():
    prior = [{"samples": 1, "probabilities": [8, 1, 1]}, {"samples": 8, "probabilities": [1, 8, 1]}]
    policy = action_policy(max_prob_mask=0.9, masked_steps="prior", action_prior=prior)
    for parallel, usual in ((1, (0.5, 1, 3, 0)), (8, (1.5, 1, 0, 0.25))):
        table = action_table([-1, 2], [usual[0], 1.0], [1, 0.5])
        control = shuffled(policy, table, parallel_samples=parallel)
        assert every_tuple(control, 2) == sorted([usual, (1.0, 0.5, 0, 0)])
    with pytest.raises(ValueError, match="parallel_samples"):
        shuffled(policy, action_table([-1, 2], [0.5, 1.0], [1, 0.5]))
    one_prior = action_policy(max_prob_mask=0.9, masked_steps="prior", action_prior=prior[:1])
    assert every_tuple(shuffled(one_prior, action_table([-1], [0.5], [1])), 1) == [(0.5, 1, 3, 0)]


def test_a_policy_that_decides_once_is_shuffled_over_sequences():
    # The second sequence is longer, and still counts once.
    table = action_table([0, 1, 1, 1], [0.5, 1.5, 1.5, 1.5], [1] * 4, position=[0, 0, 1, 2])
    control = shuffled(action_policy(policy="sequence_actions"), table)
    assert control.decides_once
    assert every_tuple(control, 2) == [(0.5, 1, 3, 0), (1.5, 1, 0, 0.25)]


def test_a_shuffle_refuses_what_it_cannot_draw_from():
    policy = action_policy()
    with pytest.raises(ValueError, match="token 1 has nan as its `temperature`"):
        shuffled(policy, action_table([0, 1], [0.5, math.nan], [1, 1]))
    with pytest.raises(ValueError, match="at least one token"):
        shuffled(policy, action_table([], [], []))
    for bins in (0, -2, 1.5, True):
        with pytest.raises(ValueError, match="`bins` is"):
            shuffled(policy, action_table([0], [0.5], [1]), bins)
    with pytest.raises(ValueError, match="`entropy` is missing"):
        ShuffledPolicy(SamplingParameters(temperature=torch.ones(3)), bins=2)
    with pytest.raises(ValueError, match="at least one token"):
        ShuffledPolicy(SamplingParameters())


# --- one output alone -------------------------------------------------------------------------------------------------


def test_one_output_alone_is_the_joint_adapters_own():
    policy = tiny.randomise_heads(tiny.wrap()).decoding_adapter
    hidden, logits = (x.flatten(0, 1) for x in tiny.hidden_and_logits(tiny.build_base(), tiny.prompts(6, 20)))
    joint = policy(DecodeState(hidden, logits))
    assert joint.temperature.std() > 0.1
    for output, other in (("temperature", "top_p"), ("top_p", "temperature")):
        found = only(policy, output)(DecodeState(hidden, logits))
        assert torch.equal(vars(found)[output], vars(joint)[output])  # top-p has seen the predicted temperature
        assert vars(found)[other] is None


def test_one_output_alone_decodes(testbed):
    model, tokenizer, prompts = testbed
    model.train()
    for output, other in (("temperature", "top_p"), ("top_p", "temperature")):
        control = only(model.decoding_adapter, output)
        found = complete(model, tokenizer, prompts, policy=control, token_budget=8)
        flat = np.concatenate([vars(group[0])[output] for group in found])
        assert flat.std() > 0.05
        assert all((vars(group[0])[other] == 1).all() for group in found)
        assert model.decoding_adapter.training
    model.eval()
    assert not only(model.decoding_adapter, "top_p").training


def test_one_output_alone_reads_logits_if_the_adapter_does():
    policy = tiny.wrap(features=["hidden", "statistics"]).decoding_adapter
    assert only(policy, "top_p").needs_logits
    assert not only(tiny.wrap().decoding_adapter, "top_p").needs_logits


def test_switching_off_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="`output` is 'top_k'"):
        only(tiny.wrap().decoding_adapter, "top_k")
    for policy in (tiny.wrap(heads=["top_p"]).decoding_adapter, action_policy()):
        with pytest.raises(ValueError, match="two heads"):
            only(policy, "top_p")


# --- searches ---------------------------------------------------------------------------------------------------------


def test_an_expert_searches_temperature_first_and_then_top_p():
    asked = []

    def measure(given):
        asked.append(given)
        return -((given["temperature"] - 0.72) ** 2) - (given.get("top_p", 1.0) - 0.88) ** 2

    found = expert_search(measure)
    assert found.settings == {"temperature": 0.7, "top_p": 0.9}
    assert found.score == measure(found.settings)
    temperatures = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    masses = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    expected = [{"temperature": 0.0}, *({"temperature": t, "top_p": 1.0} for t in temperatures)]
    expected += [{"temperature": 0.7, "top_p": p} for p in masses]
    assert [one["settings"] for one in found.path] == expected == asked[:-1]
    assert [one["score"] for one in found.path] == [measure(one) for one in expected]


def test_of_equal_scores_the_colder_temperature_and_the_larger_top_p_stay():
    assert expert_search(lambda given: 0.5).settings == {"temperature": 0.0}
    warm = expert_search(lambda given: float(given["temperature"] >= 0.3), with_greedy=False)
    assert warm.settings == {"temperature": 0.3, "top_p": 1.0}


def test_greedy_has_no_top_p_to_search_for():
    found = expert_search(lambda given: -given["temperature"], step=0.5, highest=1.0)
    assert [one["settings"]["temperature"] for one in found.path] == [0.0, 0.5, 1.0]


def test_a_measure_that_changes_the_settings_it_is_given_changes_nothing_else():
    def careless(given):
        given.clear()
        return 1.0

    assert expert_search(careless, with_greedy=False).settings == {"temperature": 0.1, "top_p": 1.0}


@pytest.mark.parametrize("wrong", [{"step": 0.0}, {"step": 0.6}, {"step": math.nan}, {"highest": 0.05}], ids=str)
def test_a_search_without_a_grid_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        expert_search(lambda given: 0.0, **wrong)


GRID = [round(0.1 * place, 1) for place in range(1, 17)]


def cubic(inflexion: float, temperatures=GRID) -> np.ndarray:
    """Log entropy with one inflexion: concave below it, convex above."""
    t = np.array(temperatures) - inflexion
    return np.exp(2 * t**3 + 0.4 * t - 1)


@given(st.floats(0.3, 1.4))
def test_turn_finds_a_known_inflexion(inflexion):
    assert turn_temperature(GRID, cubic(inflexion)) == pytest.approx(inflexion, abs=1e-6)
    assert turn_temperature(GRID, cubic(inflexion), 0.1) == pytest.approx(inflexion + 0.1, abs=1e-6)


def test_turn_weighs_second_differences_by_the_steps_between_temperatures():
    # Slopes 3, 1 and 2; second differences -2 at T = 2 and 1 / 1.5 at T = 3; 0 at 2 + 2 / (2 + 2/3).
    log_entropies = np.array([0.0, 3.0, 4.0, 8.0])
    assert turn_temperature([1.0, 2.0, 3.0, 5.0], np.exp(log_entropies)) == pytest.approx(2.75)


@given(st.floats(0.5, 1.2), st.integers(0, 1000))
def test_turn_finds_it_on_an_uneven_grid_and_under_noise(inflexion, seed):
    rng = np.random.default_rng(seed)
    uneven = np.sort(rng.uniform(0.1, 1.6, 40))
    assert turn_temperature(uneven, cubic(inflexion, uneven)) == pytest.approx(inflexion, abs=0.25)
    noisy = cubic(inflexion) * np.exp(rng.uniform(-0.002, 0.002, len(GRID)))
    assert turn_temperature(GRID, noisy) == pytest.approx(inflexion, abs=0.25)


def test_turn_is_not_taken_in_by_a_curve_that_levels_off():
    # Near log V the curve goes flat: its slope is least there, and it does not rise again.
    temperatures = np.arange(0.1, 3.0, 0.1)
    curve = np.minimum(np.log(cubic(0.8, temperatures)), 1.0 + 0.01 * temperatures)
    assert turn_temperature(temperatures, np.exp(curve)) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    ("temperatures", "entropies", "words"),
    [
        (GRID, np.ones(3), "an entropy for each"),
        (GRID[::-1], np.sqrt(GRID), "ascending"),
        ([0.0, *GRID[1:]], np.sqrt(GRID), "above 0"),
        (GRID[:3], np.sqrt(GRID[:3]), "at least 4"),
        (GRID, [0.0, *np.sqrt(GRID[1:])], "above 0"),
        (GRID, [math.nan, *np.sqrt(GRID[1:])], "finite"),
    ],
)
def test_turn_refuses_what_is_no_curve(temperatures, entropies, words):
    with pytest.raises(ValueError, match=words):
        turn_temperature(temperatures, entropies)


@pytest.mark.parametrize(
    ("entropies", "end", "words"),
    [(np.sqrt(GRID), GRID[-1], "concave.*higher"), (np.exp(np.square(GRID)), GRID[0], "convex.*lower")],
    ids=["concave", "convex"],
)
def test_a_curve_that_does_not_turn_is_turned_at_its_end_with_a_warning(entropies, end, words):
    with pytest.warns(UserWarning, match=words):
        assert turn_temperature(GRID, entropies, 0.1) == pytest.approx(end + 0.1)


def test_measured_entropies_are_those_of_the_distributions_that_were_sampled_from(testbed):
    model, tokenizer, prompts = testbed
    how = {"token_budget": 12, "samples": 3, "seed": 5}
    found = measure_entropies(model, tokenizer, prompts[:4], [0.5, 1.5], **how)
    for temperature, mean in zip((0.5, 1.5), found, strict=True):
        completions = complete(model, tokenizer, prompts[:4], settings={"temperature": temperature}, **how)
        entropies = []
        for prompt, group in zip(prompts, completions, strict=False):
            ids = encode_prompt(tokenizer, prompt)
            for one in group:
                with torch.no_grad():
                    logits = model(torch.tensor([[*ids, *one.token_ids]])).logits[0, len(ids) - 1 : -1]
                entropies += torch.distributions.Categorical(logits=logits.double() / temperature).entropy().tolist()
        assert mean == pytest.approx(np.mean(entropies), abs=1e-5)
    assert found[0] < found[1]
    assert measure_entropies(model, tokenizer, prompts[:4], [1.5], **how, batch_rows=2) == pytest.approx(found[1:])


# --- decomposition ----------------------------------------------------------------------------------------------------


def documents(rows: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    """Texts of different lengths, whose first tokens do not count."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, tiny.VOCABULARY, rng.integers(6, 30)).tolist() for _ in range(rows)]
    return [{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in texts]


def likelihoods(model, row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A document's hidden states, logits in double precision and targets, where a token counts."""
    hidden, logits = (x[0, 2:-1] for x in tiny.hidden_and_logits(model, torch.tensor([row["input_ids"]])))
    return hidden, logits.double(), torch.tensor(row["labels"][3:])


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_parts_are_the_derivatives_that_autograd_finds(family):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    rows = documents()
    found = decompose(model, rows)
    betas = [1 / model.decoding_adapter(DecodeState(likelihoods(model, row)[0])).temperature.double() for row in rows]
    mean = torch.cat(betas).mean().detach().requires_grad_()
    expected = {"base": [], **{part: [] for part in PARTS}, "adapter": []}
    for row, own in zip(rows, betas, strict=True):
        _, logits, targets = likelihoods(model, row)

        def log_p(beta, logits=logits, targets=targets):
            return (logits * beta).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

        at = mean.expand(len(targets)).clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_p(at[:, None]).sum(), at, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), at)
        away = own.detach() - mean.detach()
        base, central, adapter = (log_p(beta) for beta in (1.0, mean, own[:, None]))
        parts = {"base": base, "mean_shift": central - base, "alignment": slope * away, "adapter": adapter}
        parts["penalty"] = -curvature * away**2 / 2
        parts["remainder"] = adapter - central - parts["alignment"] + parts["penalty"]
        for name, values in parts.items():
            expected[name] += values.tolist()
    for name, values in expected.items():
        assert np.abs(np.array(values)).max() > 0.01, name
        column = found.adapter if name == "adapter" else vars(found)[name]
        assert column == pytest.approx(np.array(values), abs=2e-4, rel=1e-4), name
    assert found.inverse_temperature == pytest.approx(torch.cat(betas).detach().numpy(), rel=1e-5)
    assert (found.penalty >= 0).all()


def test_the_parts_sum_to_the_adapters_likelihood_by_token_by_document_and_over_all():
    model = tiny.randomise_heads(tiny.wrap())
    rows = documents()
    found = decompose(model, rows)
    truth = text_likelihood(model, rows, [1.0, 1 / found.inverse_temperature.mean()])
    by_document = {name: found.by_document(name) for name in ("base", "gain", "adapter", *PARTS)}
    assert by_document["base"] == pytest.approx(-truth.static[:, 0], rel=1e-6)
    assert by_document["adapter"] == pytest.approx(-truth.adapter, rel=1e-6)
    assert by_document["mean_shift"] == pytest.approx(truth.static[:, 0] - truth.static[:, 1], abs=1e-4)
    signs = {"base": 1, "mean_shift": 1, "alignment": 1, "penalty": -1, "remainder": 1}
    for values, whole in ((vars(found), found.adapter), (by_document, by_document["adapter"])):
        assert sum(sign * values[name] for name, sign in signs.items()) == pytest.approx(whole, abs=1e-12)
    assert np.bincount(found.document).tolist() == truth.tokens.tolist()
    assert found.interval("gain").mean == pytest.approx(float((found.adapter - found.base).mean()))
    scaled = by_document["alignment"] / truth.tokens.mean()
    interval = bootstrap_interval(scaled, seed=3)
    assert list(vars(found.interval("alignment", seed=3)).values()) == pytest.approx(list(vars(interval).values()))


@pytest.mark.parametrize("settings", [{"heads": ["top_p"]}, {"temperature": 0.7}], ids=["no temperature", "T = 0.7"])
def test_a_constant_adapter_is_all_mean_shift(settings):
    actions = [settings] if "temperature" in settings else None
    model = tiny.wrap(policy="static", actions=actions) if actions else tiny.wrap(**settings)
    found = decompose(model, documents())
    for part in ("alignment", "penalty", "remainder"):
        assert np.abs(vars(found)[part]).max() < 1e-5, part
    shift = np.abs(found.mean_shift).max()
    assert shift > 0.1 if actions else shift < 1e-6


def test_a_document_without_a_token_that_counts_changes_nothing_but_the_interval():
    model = tiny.randomise_heads(tiny.wrap())
    rows = documents()
    silent = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    found, plain = decompose(model, [silent, *rows, silent]), decompose(model, rows)
    assert found.by_document("gain").tolist() == [0.0, *plain.by_document("gain"), 0.0]
    assert found.interval("gain").mean == pytest.approx(plain.interval("gain").mean)


def test_an_adapter_without_likelihood_is_refused():
    with pytest.raises(ValueError, match=r"token 0 has temperature 0\.0: greedy"):
        decompose(tiny.wrap(policy="static", actions=[{"temperature": 0.0}]), documents())
    with pytest.raises(ValueError, match="no token"):
        decompose(tiny.wrap(), [{"input_ids": [3, 4], "labels": [-100, -100]}])
