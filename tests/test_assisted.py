"""Assisted generation with an adapter: the draft may be anything, the distribution is the adaptive one."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny import PAD, VOCABULARY, hidden_and_logits, hooks_left, sample
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.capture import current_call
from hf_adaptive_decode.errors import UnsupportedGenerationError

TRACED = {"return_dict_in_generate": True, "output_scores": True, "output_decoding_trace": True, "output_logits": True}
ENDLESS = {"eos_token_id": None, "pad_token_id": PAD}
PLAIN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
NEVER = -float("inf")
FAMILIES = ("qwen3", "llama", "gpt2", "gemma2", "gpt_oss", "opt")
# Of these transformers' own early exit can do only some.
WAYS = [(family, kind) for family in FAMILIES for kind in ("draft model", "prompt lookup")]
WAYS += [(family, "early exit") for family in ("qwen3", "llama", "gemma2")]


def draft_model():
    """Close enough to the qwen3 target that some drafts are accepted, and far enough that some are not."""
    draft = tiny.build_base()
    with torch.no_grad():
        draft.get_output_embeddings().weight.add_(0.2 * torch.randn(draft.get_output_embeddings().weight.shape))
    return draft


def drafts(kind: str, family: str = "qwen3") -> dict:
    if kind == "draft model":
        return {"assistant_model": draft_model() if family == "qwen3" else tiny.build_base(family)}
    return {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {"assistant_early_exit": 1}


def repetitive(length: int = 12) -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8] * (length // 4)])


def warped(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    return chain(None, logits)


def assert_scores_are_the_adapters(model, found, prompt_length: int) -> None:
    """Each position by the hidden state of its own, read once more in one pass over the finished text."""
    hidden, logits = hidden_and_logits(model, found.sequences[:, :-1])
    new = found.sequences.shape[1] - prompt_length
    assert len(found.scores) == new
    assert found.decoding_trace.temperature.shape == (1, new)
    for step in range(new):
        at = prompt_length - 1 + step
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, at])
        assert torch.allclose(found.decoding_trace.temperature[:, step], temperature, atol=1e-4)
        assert torch.allclose(found.decoding_trace.top_p[:, step], top_p, atol=1e-4)
        expected = warped(logits[:, at], float(temperature), float(top_p))
        kept = expected > NEVER
        # A nucleus may end at a tie that rounding decides.
        assert (kept != (found.scores[step] > NEVER)).sum() <= 1
        both = kept & (found.scores[step] > NEVER)
        assert torch.allclose(found.scores[step][both], expected[both], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "kind"), WAYS)
def test_every_position_is_decided_by_its_own_hidden_state(family, kind):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    ids = repetitive()
    for seed in range(2):
        found = sample(model, ids, seed=seed, max_new_tokens=10, **drafts(kind, family), **TRACED, **ENDLESS)
        assert_scores_are_the_adapters(model, found, ids.shape[1])
    assert hooks_left(model) == 0
    assert current_call() is None


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup", "early exit"])
def test_an_identity_adapter_is_the_bases_own_assisted_sampling(kind):
    base = tiny.build_base()
    model = tiny.make_heads_identity(tiny.wrap(tiny.build_base()))
    dicts = {"return_dict_in_generate": True, "output_scores": True}
    for seed in range(3):
        torch.manual_seed(0)
        expected = sample(base, repetitive(), seed=seed, max_new_tokens=12, **drafts(kind), **PLAIN, **dicts, **ENDLESS)
        torch.manual_seed(0)
        found = sample(model, repetitive(), seed=seed, max_new_tokens=12, **drafts(kind), **dicts, **ENDLESS)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup", "early exit"])
def test_assisted_greedy_search_is_the_bases_own(model, kind):
    expected = tiny.build_base().generate(repetitive(), max_new_tokens=12, do_sample=False, **ENDLESS)
    found = model.generate(repetitive(), max_new_tokens=12, do_sample=False, **drafts(kind), **ENDLESS)
    assert torch.equal(found, expected)


class Remember(LogitsProcessor):
    """Hears every score that it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.shape[1], scores.clone()))
        return scores


@pytest.mark.parametrize("kind", ["draft model", "early exit"])
def test_the_draft_never_sees_the_adapter(model, kind, monkeypatch):
    """The drafted tokens and their scores are those that the same draft makes for the base."""
    from transformers.generation import candidate_generator

    heard = []
    make = candidate_generator.AssistedCandidateGenerator._generate_candidates

    def listen(self, arguments):
        ids, logits = make(self, arguments)
        processors = [type(p).__name__ for p in arguments["logits_processor"]]
        heard.append((ids, logits, processors))
        return ids, logits

    monkeypatch.setattr(candidate_generator.AssistedCandidateGenerator, "_generate_candidates", listen)
    found = []
    for one in (tiny.build_base(), model):
        heard.clear()
        torch.manual_seed(0)
        settings = PLAIN if one is not model else {}
        sample(one, repetitive(), seed=3, max_new_tokens=5, **drafts(kind), **settings, **ENDLESS)
        found.append(heard[0])
    (ids, logits, _), (ours, our_logits, processors) = found
    assert torch.equal(ids, ours)
    assert torch.equal(logits, our_logits)
    assert "AdaptiveSamplerLogitsProcessor" not in processors
    assert "_TakeHidden" not in processors


def exact_second_token(model, ids: torch.Tensor) -> torch.Tensor:
    """The distribution `[V]` of the second new token, summed over all first ones."""

    def adaptive(rows: torch.Tensor) -> torch.Tensor:
        hidden, logits = hidden_and_logits(model, rows)
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, -1])
        each = [
            warped(row[None], t, p)
            for row, t, p in zip(logits[:, -1], temperature.tolist(), top_p.tolist(), strict=True)
        ]
        return torch.cat(each).softmax(-1)

    first = adaptive(ids)[0]
    rows = torch.cat([ids.repeat(VOCABULARY, 1), torch.arange(VOCABULARY)[:, None]], dim=1)
    return first @ adaptive(rows)


def g_statistic(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Of counts `[V]` against probabilities `[V]`, with rare words in one bin; and its degrees of freedom."""
    total = counts.sum()
    common = expected * total >= 8
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double() * total
    if wanted[-1] < 8:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(((observed - wanted) ** 2 / wanted).sum()), len(observed) - 1


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup"])
def test_the_output_distribution_is_the_adaptive_one(model, kind):
    """
    Second tokens of 400 runs against the exact distribution, by a chi-square statistic beyond which a right sampler
    falls with odds below 1e-6 (Wilson-Hilferty, z = 4.9); the base's own distribution is rejected.
    """
    ids, runs = repetitive(8), 400
    helper = drafts(kind)
    torch.manual_seed(11)
    counts = torch.zeros(VOCABULARY)
    for _ in range(runs):
        counts[model.generate(ids, max_new_tokens=3, **helper, **ENDLESS)[0, -2]] += 1

    def rejected(expected: torch.Tensor) -> bool:
        statistic, freedom = g_statistic(counts, expected)
        bound = freedom * (1 - 2 / (9 * freedom) + 4.9 * math.sqrt(2 / (9 * freedom))) ** 3
        return statistic > bound

    assert not rejected(exact_second_token(model, ids))
    identity = tiny.make_heads_identity(tiny.wrap(tiny.build_base()))
    assert rejected(exact_second_token(identity, ids))


def test_what_is_left_of_a_budget_is_counted_by_position(base):
    """Hot while 4 or more tokens are left, greedy after; whatever was drafted and refused on the way."""
    config = AutoDecoConfig(
        policy="token_actions", actions=[{"temperature": 0.0}, {"temperature": 1.5}], deterministic=True
    )

    model = AutoDecoForCausalLM.from_base(base, config)
    policy = model.decoding_adapter

    def by_budget(seen):
        hot = (seen.remaining_tokens >= 4).float()
        return torch.stack([1 - hot, hot], dim=-1)

    policy.action_logits = by_budget
    for seed in range(3):
        found = sample(model, repetitive(), seed=seed, budget=9, **drafts("prompt lookup"), **TRACED, **ENDLESS)
        assert found.decoding_trace.action.tolist() == [[1] * 6 + [0] * 3]


def test_other_processors_go_with_drafts(model):
    """A constraint of the user's holds for draft and target, and nothing it forbids comes back."""

    class Odd(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ::2] = NEVER
            return scores

    found = sample(
        model, repetitive(), max_new_tokens=12, logits_processor=[Odd()], **drafts("draft model"), **TRACED, **ENDLESS
    )
    assert (found.sequences[:, 12:] % 2 == 1).all()


def test_drafts_do_not_go_with_a_mean_over_the_prompt(base):

    config = AutoDecoConfig(policy="sequence_actions", actions=[{"temperature": 1.0}], pooling="mean")
    model = AutoDecoForCausalLM.from_base(base, config)
    with pytest.raises(UnsupportedGenerationError, match="mean over the prompt"):
        model.generate(repetitive(), max_new_tokens=4, **drafts("draft model"))
    assert hooks_left(model) == 0


def test_an_assistant_with_an_adapter_of_its_own_drafts_without_it(model):
    assistant = tiny.randomise_heads(tiny.wrap(tiny.build_base()), seed=5)
    found = sample(model, repetitive(), max_new_tokens=8, assistant_model=assistant, **TRACED, **ENDLESS)
    assert_scores_are_the_adapters(model, found, 12)


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup"])
def test_the_bare_processor_refuses_drafts(model, base, tmp_path, kind):
    model.save_pretrained(tmp_path)
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained(tmp_path, base)
    with pytest.raises(UnsupportedGenerationError, match="ran 0 times"):
        base.generate(
            repetitive(), max_new_tokens=6, do_sample=True, top_k=0, logits_processor=[processor], **drafts(kind)
        )
    processor.close()
