"""`generate` with an adapter: what it must leave exactly as the base has it, and what it must sample from."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import tiny
import torch
from tiny import EOS, PAD, VOCABULARY, hidden_and_logits, hooks_left, left_padded, prompts, sample
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    Budget,
    DecodeState,
    DecodingTrace,
    SamplingParameters,
)
from hf_adaptive_decode.capture import current_call
from hf_adaptive_decode.errors import AdaptiveDecodeError, BudgetError, LogitsError, UnsupportedGenerationError
from hf_adaptive_decode.policies import DecodingPolicy

NEVER = -float("inf")
DICT = {"return_dict_in_generate": True, "output_scores": True}
TRACED = {**DICT, "output_decoding_trace": True}
# No row ends early in tests that are about something else.
ENDLESS = {"eos_token_id": None, "pad_token_id": PAD}
PLAIN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def pair(family: str = "qwen3", seed: int = 0):
    """A base left as it was, and an adaptive model made from a copy of it."""
    return tiny.build_base(family), tiny.randomise_heads(tiny.wrap(tiny.build_base(family)), seed)


def assert_same_output(found, expected, atol: float = 1e-5, exactly: bool = False) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(ours == NEVER, theirs == NEVER)
        assert torch.equal(ours, theirs) if exactly else torch.allclose(ours, theirs, rtol=1e-5, atol=atol)


def warp_row(row: torch.Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0) -> torch.Tensor:
    """One row of logits `[V]` through transformers' own warpers."""
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(chain)(None, row[None])[0]


def slow_truth(model, input_ids, steps: int, seed: int, fixed: dict | None = None):
    """
    Sampling as the method is written down: no cache, one forward pass a token, heads by hand, transformers' warpers.

    Returns tokens `[B, L + steps]`, temperatures and top-ps `[B, steps]`, and the warped scores of each step.
    """
    fixed = fixed or {}
    torch.manual_seed(seed)
    temperatures, top_ps, scores = [], [], []
    for _ in range(steps):
        hidden, logits = hidden_and_logits(model, input_ids)
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, -1])
        temperature = torch.full_like(temperature, fixed["temperature"]) if "temperature" in fixed else temperature
        top_p = torch.full_like(top_p, fixed["top_p"]) if "top_p" in fixed else top_p
        others = {name: fixed[name] for name in ("top_k", "min_p") if name in fixed}
        rows = zip(logits[:, -1], temperature.tolist(), top_p.tolist(), strict=True)
        warped = torch.stack([warp_row(row, t, p, **others) for row, t, p in rows])
        token = torch.multinomial(warped.softmax(-1), 1)
        input_ids = torch.cat([input_ids, token], dim=1)
        temperatures.append(temperature)
        top_ps.append(top_p)
        scores.append(warped)
    return input_ids, torch.stack(temperatures, 1), torch.stack(top_ps, 1), scores


# --- what the adapter must leave alone ------------------------------------------------------------------------------


def test_an_identity_adapter_samples_as_the_base_does(family):
    base = tiny.build_base(family)
    model = tiny.make_heads_identity(tiny.wrap(copy.deepcopy(base)))
    ids = prompts(3, 6)
    for seed in range(3):
        expected = sample(base, ids, seed=seed, max_new_tokens=12, **PLAIN, **DICT)
        assert_same_output(sample(model, ids, seed=seed, max_new_tokens=12, **DICT), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_return_sequences": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7], [8, 9]]},
        {"min_new_tokens": 8},
        {"guidance_scale": 1.8},
        {"renormalize_logits": True},
        {"suppress_tokens": [3, 4, 5, 6]},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.01},
        {"eta_cutoff": 0.02},
        {"prefix_allowed_tokens_fn": lambda _batch, _ids: list(range(10, 40))},
        {"prefill_chunk_size": 3},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"max_length": 14},
        {"logits_to_keep": 0},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_an_identity_adapter_is_the_base_in_every_mode(mode):
    base = tiny.build_base()
    base.set_attn_implementation("eager")
    model = tiny.make_heads_identity(tiny.wrap(copy.deepcopy(base)))
    ids, mask = left_padded([prompts(1, 8)[0], prompts(1, 5, seed=4)[0]])
    settings = {"attention_mask": mask, **({} if "max_length" in mode else {"max_new_tokens": 8}), **mode}
    expected = sample(base, ids, **settings, **PLAIN, **DICT)
    assert_same_output(sample(model, ids, **settings, **DICT), expected)


def test_an_identity_adapter_watermarks_as_the_base_does(identity):
    watermark = WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")
    mode = {"max_new_tokens": 8, "watermarking_config": watermark}
    expected = sample(tiny.build_base(), prompts(), **mode, **PLAIN, **DICT)
    assert_same_output(sample(identity, prompts(), **mode, **DICT), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_greedy_and_beams_are_the_bases_own(family, mode):
    # Frozen beforehand, since torch multiplies matrices that require gradients another way and rounds otherwise.
    model, ids = tiny.build_base(family).requires_grad_(False), prompts(2, 6)
    expected = sample(model, ids, max_new_tokens=8, **mode, **DICT)
    model = tiny.randomise_heads(tiny.wrap(model))
    assert_same_output(sample(model, ids, max_new_tokens=8, **mode, **DICT), expected, exactly=True)


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 7}, {"num_beams": 2}], ids=str)
def test_a_disabled_adapter_is_the_base_exactly(base, mode):
    base.requires_grad_(False).generation_config.update(temperature=0.6, top_p=0.8, typical_p=0.9)
    expected = sample(base, prompts(), max_new_tokens=8, **mode, **DICT)
    model = tiny.randomise_heads(tiny.wrap(base))
    with model.disable_adapter():
        found = sample(model, prompts(), max_new_tokens=8, **mode, **DICT)
    assert_same_output(found, expected, exactly=True)
    assert not torch.equal(sample(model, prompts(), max_new_tokens=8), expected.sequences)


def test_disabling_ends_with_its_block_even_after_an_error(model):
    with pytest.raises(RuntimeError), model.disable_adapter(), model.disable_adapter():
        raise RuntimeError
    assert sample(model, prompts(), max_new_tokens=2, **TRACED).decoding_trace is not None


def test_forward_is_untouched(family):
    base, model = pair(family)
    ids = prompts(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids, labels=ids).loss, base(ids, labels=ids).loss)


def test_the_model_is_an_instance_of_both_classes(family):
    kind = type(tiny.build_base(family))
    model = tiny.wrap(tiny.build_base(family))
    assert isinstance(model, AutoDecoForCausalLM)
    assert isinstance(model, kind)
    assert type(model.config) is kind.config_class
    assert model.can_generate()


def test_only_the_adapter_is_trainable(model):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"decoding_adapters.default.{name}" for name, _ in model.decoding_adapter.named_parameters()}
    numbers = sum(p.numel() for p in model.decoding_adapter.parameters()), sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == numbers


def test_printing_the_trainable_parameters(model, capsys):
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in printed


def test_train_keeps_a_frozen_base_without_dropout():
    model = tiny.wrap(tiny.build_base("gpt2"))
    ids = prompts(2, 9)
    expected = model(ids).logits
    assert model.train() is model
    assert model.training
    assert model.decoding_adapter.training
    assert torch.equal(model(ids).logits, expected)
    assert not any(m.training for m in model.transformer.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_train_leaves_dropout_on_in_a_base_that_is_being_trained():
    model = tiny.wrap(tiny.build_base("gpt2"))
    model.transformer.requires_grad_(True)
    model.train()
    assert not torch.equal(model(prompts()).logits, model(prompts()).logits)


def test_a_copy_of_the_model_is_a_model_of_its_own(model):
    twin = copy.deepcopy(model)
    assert isinstance(twin, AutoDecoForCausalLM)
    tiny.make_heads_identity(twin)
    expected = sample(tiny.build_base(), prompts(), max_new_tokens=8, **PLAIN)
    assert torch.equal(sample(twin, prompts(), max_new_tokens=8), expected)
    assert not torch.equal(sample(model, prompts(), max_new_tokens=8), expected)


# --- against the slow truth -----------------------------------------------------------------------------------------


def test_generate_is_the_slow_truth(family):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    ids = prompts(3, 5)
    for seed in range(2):
        tokens, temperature, top_p, scores = slow_truth(model, ids, steps=8, seed=seed)
        found = sample(model, ids, seed=seed, max_new_tokens=8, **TRACED, **ENDLESS)
        assert torch.equal(found.sequences, tokens)
        assert torch.allclose(found.decoding_trace.temperature, temperature, atol=1e-5)
        assert torch.allclose(found.decoding_trace.top_p, top_p, atol=1e-5)
        assert temperature.std() > 0.2
        for ours, theirs in zip(found.scores, scores, strict=True):
            assert torch.equal(ours == NEVER, theirs == NEVER)
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fixed",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"temperature": 0.5, "top_p": 0.6},
        {"top_k": 3},
        {"min_p": 0.2},
        {"temperature": 1.9, "top_p": 0.95, "top_k": 9, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["keywords", "generation_config"])
def test_explicit_parameters_beat_the_adapter(model, fixed, how):
    tokens, temperature, top_p, scores = slow_truth(model, prompts(), steps=8, seed=1, fixed=fixed)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 8, **DICT, **fixed}
    if how == "generation_config":
        settings = {"generation_config": GenerationConfig(do_sample=True, **settings)}
    found = sample(model, prompts(), seed=1, output_decoding_trace=True, **settings)
    assert torch.equal(found.sequences, tokens)
    assert torch.allclose(found.decoding_trace.temperature, temperature, atol=1e-5)
    assert torch.allclose(found.decoding_trace.top_p, top_p, atol=1e-5)
    for ours, theirs in zip(found.scores, scores, strict=True):
        assert torch.equal(ours == NEVER, theirs == NEVER)


def test_an_explicit_temperature_of_zero_is_greedy(model):
    expected = tiny.build_base().generate(prompts(), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompts(), max_new_tokens=8, temperature=0.0), expected)


def test_sampling_settings_of_the_base_do_not_leak_in(model):
    expected = sample(model, prompts(), max_new_tokens=8, **DICT)
    model.generation_config.update(temperature=0.1, top_k=2, top_p=0.2, min_p=0.5, typical_p=0.3, epsilon_cutoff=0.2)
    model.generation_config.update(eta_cutoff=0.2, do_sample=False, num_beams=4)
    assert_same_output(sample(model, prompts(), max_new_tokens=8, **DICT), expected, exactly=True)


def test_other_settings_of_the_base_stay(model):
    model.generation_config.update(max_new_tokens=3, suppress_tokens=list(range(3, 90)))
    found = model.generate(prompts(2, 4))
    assert found.shape[1] <= 7
    assert not set(found[:, 4:].flatten().tolist()) & set(range(3, 90))


def test_no_config_is_mutated(model):
    model.generation_config.update(temperature=0.6, top_k=13)
    own = model.generation_config.to_dict()
    given = GenerationConfig(max_new_tokens=9, top_p=0.7)
    before = given.to_dict()
    for budget in (4, Budget(tokens=[2, 3, 4], samples=2)):
        model.generate(prompts(), generation_config=given, budget=budget)
    model.generate(prompts(), max_new_tokens=2, num_return_sequences=2)
    assert given.to_dict() == before
    assert model.generation_config.to_dict() == own


def test_a_statistics_adapter_reads_the_scores_about_to_be_warped(model):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(), features=["hidden", "statistics"]))
    penalised = {"bad_words_ids": [[5], [11], [23]], "max_new_tokens": 6}
    found = sample(model, prompts(), **penalised, **TRACED, **ENDLESS)
    hidden, logits = hidden_and_logits(model, found.sequences[:, :-1])
    logits[..., [5, 11, 23]] = NEVER
    state = DecodeState(hidden[:, 4:].flatten(0, 1), logits[:, 4:].flatten(0, 1))
    with torch.no_grad():
        expected = model.decoding_adapter(state)
    assert torch.allclose(found.decoding_trace.temperature.flatten(), expected.temperature, atol=1e-4)
    assert torch.allclose(found.decoding_trace.top_p.flatten(), expected.top_p, atol=1e-4)


# --- the trace ------------------------------------------------------------------------------------------------------


def test_the_trace_is_exactly_what_was_sampled_from(family):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    ids = prompts(3, 5)
    found = sample(model, ids, max_new_tokens=10, **TRACED, output_logits=True, **ENDLESS)
    hidden, _ = hidden_and_logits(model, found.sequences[:, :-1])
    steps = len(found.scores)
    trace = found.decoding_trace
    assert isinstance(trace, DecodingTrace)
    assert trace.temperature.shape == trace.top_p.shape == (3, steps)
    assert trace.temperature.dtype == trace.top_p.dtype == torch.float32
    assert trace.action is None
    for step in range(steps):
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, 4 + step])
        assert torch.allclose(trace.temperature[:, step], temperature, atol=1e-5)
        assert torch.allclose(trace.top_p[:, step], top_p, atol=1e-5)
        rows = zip(found.logits[step], trace.temperature[:, step].tolist(), trace.top_p[:, step].tolist(), strict=True)
        expected = torch.stack([warp_row(row, t, p) for row, t, p in rows])
        assert torch.allclose(found.scores[step], expected, rtol=1e-5, atol=1e-5)


def test_transition_scores_come_from_the_warped_distribution(model):
    found = sample(model, prompts(), max_new_tokens=6, **DICT, **ENDLESS)
    by_transformers = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    by_hand = torch.stack([s.log_softmax(-1) for s in found.scores], 1).gather(-1, found.sequences[:, 5:, None])[..., 0]
    assert torch.allclose(by_transformers, by_hand, atol=1e-5)
    assert torch.isfinite(by_hand).all()


def ends_at(sequences: torch.Tensor, prompt: int) -> list[int]:
    """For each row the number of its new tokens, its eos included."""
    new = sequences[:, prompt:]
    return [row.tolist().index(EOS) + 1 if EOS in row else len(row) for row in new]


def test_after_an_eos_the_trace_is_nan(model):
    model.generation_config.eos_token_id = EOS
    bias = {"sequence_bias": {(EOS,): 3.0}}
    found = sample(model, prompts(8, 4), max_new_tokens=12, **bias, **TRACED)
    lengths = ends_at(found.sequences, 4)
    assert len(set(lengths)) > 1
    assert found.decoding_trace.temperature.shape == (8, found.sequences.shape[1] - 4)
    for row, length in enumerate(lengths):
        assert torch.isfinite(found.decoding_trace.temperature[row, :length]).all()
        assert found.decoding_trace.temperature[row, length:].isnan().all()
        assert found.decoding_trace.top_p[row, length:].isnan().all()


def test_after_a_budget_the_trace_is_nan_and_the_action_minus_one():
    model = tiny.wrap(policy="static", actions=[{"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.3, "top_k": 4}])
    found = sample(model, prompts(3, 4), budget=[2, 5, 7], eos_token_id=None, pad_token_id=PAD, **TRACED)
    trace = found.decoding_trace
    assert trace.action.dtype == torch.long
    for row, length in enumerate([2, 5, 7]):
        actions = trace.action[row, :length]
        assert ((actions >= 0) & (actions < 3)).all()
        assert torch.equal(trace.temperature[row, :length], torch.tensor([0.5, 0.0, 1.0])[actions])
        assert torch.allclose(trace.top_p[row, :length], torch.tensor([1.0, 1.0, 0.3])[actions])
        assert (trace.action[row, length:] == -1).all()
        assert trace.temperature[row, length:].isnan().all()
        assert trace.top_p[row, length:].isnan().all()
        assert (found.sequences[row, 4 + length :] == PAD).all()


def test_the_trace_of_a_missing_head_is_its_off_value():
    model = tiny.randomise_heads(tiny.wrap(heads=["temperature"]))
    trace = sample(model, prompts(), max_new_tokens=4, **TRACED, **ENDLESS).decoding_trace
    assert (trace.top_p == 1).all()
    assert trace.temperature.std() > 0.05


def test_a_trace_needs_a_dict_to_be_put_in(model):
    with (
        tiny.counted_forwards(model) as calls,
        pytest.raises(UnsupportedGenerationError, match="return_dict_in_generate"),
    ):
        model.generate(prompts(), max_new_tokens=2, output_decoding_trace=True)
    assert not calls


def test_a_model_that_always_returns_dicts_can_trace(model):
    model.generation_config.return_dict_in_generate = True
    assert model.generate(prompts(), max_new_tokens=2, output_decoding_trace=True).decoding_trace is not None


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 2}])
def test_there_is_no_trace_of_a_call_that_the_adapter_takes_no_part_in(model, mode):
    with pytest.raises(UnsupportedGenerationError, match="output_decoding_trace"):
        model.generate(prompts(), max_new_tokens=2, **mode, **TRACED)
    with model.disable_adapter(), pytest.raises(UnsupportedGenerationError, match="output_decoding_trace"):
        model.generate(prompts(), max_new_tokens=2, **TRACED)


# --- a row is its own ------------------------------------------------------------------------------------------------


class Follow(LogitsProcessor):
    """Leaves one token a step, so that every run has the same tokens whatever its random numbers."""

    def __init__(self, script: torch.Tensor, prompt: int):
        self.script, self.prompt = script, prompt

    def __call__(self, input_ids, scores):
        wanted = self.script[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, NEVER).scatter(1, wanted, scores.gather(1, wanted))


def trace_along(model, ids, script, **inputs) -> DecodingTrace:
    follow = LogitsProcessorList([Follow(script, ids.shape[1])])
    settings = {"max_new_tokens": script.shape[1], "logits_processor": follow, **ENDLESS, **TRACED}
    found = model.generate(ids, **inputs, **settings)
    assert torch.equal(found.sequences[:, ids.shape[1] :], script)
    return found.decoding_trace


def test_a_rows_temperature_depends_on_nothing_but_the_row(family):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    rows = [prompts(1, length, seed=length)[0] for length in (3, 9, 6)]
    script = prompts(3, 6, seed=99)
    ids, mask = left_padded(rows)
    together = trace_along(model, ids, script, attention_mask=mask)
    order = [2, 0, 1]
    reordered = trace_along(model, ids[order], script[order], attention_mask=mask[order])
    for name in ("temperature", "top_p"):
        batch = getattr(together, name)
        assert torch.allclose(getattr(reordered, name), batch[order], atol=1e-5)
        for index, row in enumerate(rows):
            alone = getattr(trace_along(model, row[None], script[index : index + 1]), name)
            assert torch.allclose(alone[0], batch[index], atol=1e-5), (name, index)


def test_several_samples_of_a_prompt_start_from_the_same_parameters(model):
    found = sample(model, prompts(2), max_new_tokens=3, num_return_sequences=4, **TRACED, **ENDLESS)
    first = found.decoding_trace.temperature[:, 0].view(2, 4)
    assert torch.allclose(first, first[:, :1].expand(2, 4), atol=1e-6)
    assert abs(first[0, 0] - first[1, 0]) > 1e-3
    assert len({tuple(row) for row in found.sequences.tolist()}) > 2


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [4, np.int64(4), torch.tensor(4), Budget(tokens=4), Budget(4)], ids=repr)
def test_a_budget_is_the_number_of_new_tokens(model, budget):
    assert model.generate(prompts(3, 5), budget=budget, eos_token_id=None).shape == (3, 9)


@pytest.mark.parametrize(
    "budget",
    [
        [2, 6, 4],
        (2, 6, 4),
        np.array([2, 6, 4]),
        torch.tensor([2, 6, 4]),
        [np.int32(2), 6, torch.tensor(4)],
        Budget([2, 6, 4]),
    ],
    ids=lambda b: type(b).__name__,
)
def test_each_row_stops_exactly_at_its_budget(model, budget):
    found = sample(model, prompts(3, 5), budget=budget, **ENDLESS, bad_words_ids=[[PAD]])
    assert found.shape == (3, 11)
    assert (found[:, 5:] != PAD).sum(1).tolist() == [2, 6, 4]


def test_budgets_of_one_size_need_no_pad_token(model):
    model.generation_config.pad_token_id = None
    assert model.generate(prompts(2, 4), budget=[3, 3], eos_token_id=None).shape == (2, 7)


def test_rows_of_different_budgets_without_a_pad_token_are_refused(model):
    model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = None
    with pytest.raises(BudgetError, match="pad_token_id"):
        model.generate(prompts(2, 4), budget=[3, 5])


@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": False}, {"num_return_sequences": 2}],
    ids=str,
)
def test_row_budgets_hold_in_every_mode(model, mode):
    found = sample(model, prompts(2, 5), budget=[2, 6], **ENDLESS, bad_words_ids=[[PAD]], **mode)
    copies = mode.get("num_return_sequences", 1)
    assert (found[:, 5:] != PAD).sum(1).tolist() == [2] * copies + [6] * copies


def test_beam_search_takes_one_budget_for_all_rows(model):
    assert model.generate(prompts(2, 5), budget=[3, 3], num_beams=2, **ENDLESS).shape == (2, 8)
    with pytest.raises(BudgetError, match="one budget"):
        model.generate(prompts(2, 5), budget=[2, 6], num_beams=2)


def test_row_budgets_hold_for_left_padded_prompts_and_embeddings(model):
    ids, mask = left_padded([prompts(1, 3)[0], prompts(1, 7)[0]])
    found = model.generate(ids, attention_mask=mask, budget=[5, 2], **ENDLESS, bad_words_ids=[[PAD]])
    assert (found[:, 7:] != PAD).sum(1).tolist() == [5, 2]
    embeddings = model.get_input_embeddings()(ids)
    found = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, budget=[5, 2], **ENDLESS, bad_words_ids=[[PAD]]
    )
    assert (found != PAD).sum(1).tolist() == [5, 2]


@pytest.mark.parametrize(("budget", "limit", "lengths"), [(8, 3, [3, 3]), (3, 8, [3, 3]), ([2, 9], 5, [2, 5])])
def test_the_smaller_of_budget_and_max_new_tokens_holds(model, budget, limit, lengths):
    settings = {**ENDLESS, "bad_words_ids": [[PAD]]}
    by_keyword = model.generate(prompts(2, 5), budget=budget, max_new_tokens=limit, **settings)
    config = GenerationConfig(max_new_tokens=limit)
    by_config = model.generate(prompts(2, 5), generation_config=config, budget=budget, **settings)
    # Passing both is deprecated by transformers but works: keywords win over the config there.
    both = model.generate(
        prompts(2, 5), generation_config=GenerationConfig(), budget=budget, max_new_tokens=limit, **settings
    )
    for found in (by_keyword, by_config, both):
        assert (found[:, 5:] != PAD).sum(1).tolist() == lengths


def test_a_budget_beyond_all_bounds_is_capped_or_refused(model):
    for budget in (10**9, 2**70, [2**70, 4, 4]):
        try:
            assert model.generate(prompts(3, 5), budget=budget, max_new_tokens=2, eos_token_id=None).shape == (3, 7)
        except BudgetError:
            continue


@pytest.mark.parametrize("samples", [1, 3])
def test_a_parallel_budget_is_the_number_of_sequences_per_prompt(model, samples):
    found = model.generate(prompts(2, 5), budget=Budget(tokens=4, samples=samples), eos_token_id=None)
    assert found.shape == (2 * samples, 9)
    assert model.generate(prompts(2, 5), budget=Budget(samples=samples), max_new_tokens=2, eos_token_id=None).shape == (
        2 * samples,
        7,
    )


def test_row_budgets_go_with_several_samples(model):
    found = model.generate(prompts(2, 5), budget=Budget(tokens=[2, 4], samples=3), **ENDLESS, bad_words_ids=[[PAD]])
    assert (found[:, 5:] != PAD).sum(1).tolist() == [2, 2, 2, 4, 4, 4]


def test_two_different_numbers_of_samples_are_refused(model):
    with pytest.raises(BudgetError, match="num_return_sequences"):
        model.generate(prompts(), budget=Budget(samples=3), num_return_sequences=2)


def test_a_budget_of_the_generation_config_is_honoured_and_a_keyword_wins(model):
    model.generation_config.budget = 3
    assert model.generate(prompts(2, 5), eos_token_id=None).shape == (2, 8)
    assert model.generate(prompts(2, 5), budget=6, eos_token_id=None).shape == (2, 11)
    given = GenerationConfig(eos_token_id=None)
    given.budget = 4
    assert model.generate(prompts(2, 5), generation_config=given).shape[1] <= 9
    assert model.generate(prompts(2, 5), generation_config=given, budget=2).shape == (2, 7)


class Watch(DecodingPolicy):
    """Stands in for a policy and writes down what it is shown."""

    def __init__(self):
        super().__init__(AutoDecoConfig())
        self.seen = []

    def forward(self, state):
        self.seen.append(state)
        return SamplingParameters()


def test_the_policy_is_shown_what_is_left_of_each_rows_budget(model):
    model.decoding_adapters["default"] = Watch()
    model.generate(prompts(2, 5), budget=Budget(tokens=[3, 5], samples=2), **ENDLESS)
    assert [s.remaining_tokens.tolist() for s in model.decoding_adapter.seen] == [
        [max(b - t, 0) for b in (3, 3, 5, 5)] for t in range(5)
    ]
    assert all(s.parallel_samples.tolist() == [2] * 4 for s in model.decoding_adapter.seen)


@pytest.mark.parametrize(
    ("settings", "first"),
    [({"max_new_tokens": 4}, 4), ({"max_length": 11}, 6), ({"budget": 7, "max_new_tokens": 3}, 3), ({"budget": 2}, 2)],
    ids=str,
)
def test_what_is_left_is_counted_from_the_limit_that_holds(model, settings, first):
    model.decoding_adapters["default"] = Watch()
    model.generate(prompts(1, 5), **settings, **ENDLESS)
    assert [s.remaining_tokens.tolist() for s in model.decoding_adapter.seen] == [[first - t] for t in range(first)]


def test_a_budget_for_embeddings_is_counted_from_the_first_new_token(model):
    model.decoding_adapters["default"] = Watch()
    embeddings = model.get_input_embeddings()(prompts(1, 6))
    model.generate(inputs_embeds=embeddings, max_new_tokens=3, **ENDLESS)
    assert [s.remaining_tokens.tolist() for s in model.decoding_adapter.seen] == [[3], [2], [1]]


# --- everything else that goes through generate ----------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self, fail_at: int | None = None):
        self.got, self.ended, self.fail_at = [], False, fail_at

    def put(self, value):
        self.got += value.flatten().tolist()
        if self.fail_at is not None and len(self.got) > self.fail_at:
            raise RuntimeError("the listener went away")

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token(model):
    streamer = Collect()
    found = sample(model, prompts(1, 5), max_new_tokens=6, streamer=streamer, eos_token_id=None)
    assert streamer.got == found[0].tolist()
    assert streamer.ended


class StopAt(StoppingCriteria):
    def __init__(self, length: int, error: type[BaseException] | None = None):
        self.length, self.error = length, error

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= self.length
        if done and self.error is not None:
            raise self.error
        return torch.full(input_ids.shape[:1], done)


def test_the_users_stopping_criteria_stop_and_the_trace_follows(model):
    criteria = StoppingCriteriaList([StopAt(8)])
    found = model.generate(prompts(2, 5), max_new_tokens=9, stopping_criteria=criteria, **ENDLESS, **TRACED)
    assert found.sequences.shape == (2, 8)
    assert found.decoding_trace.temperature.shape == (2, 3)
    assert torch.isfinite(found.decoding_trace.temperature).all()


class Allow(LogitsProcessor):
    def __init__(self, allowed):
        self.allowed, self.seen = torch.tensor(allowed), []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        masked = torch.full_like(scores, NEVER)
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


def test_the_users_processor_sees_raw_logits_and_its_mask_is_never_undone(model):
    allow = Allow([17, 18, 40])
    found = sample(
        model,
        prompts(),
        max_new_tokens=6,
        logits_processor=LogitsProcessorList([allow]),
        output_logits=True,
        **DICT,
        **ENDLESS,
    )
    assert set(found.sequences[:, 5:].flatten().tolist()) <= {17, 18, 40}
    for seen, raw, scores in zip(allow.seen, found.logits, found.scores, strict=True):
        assert torch.equal(seen, raw)
        forbidden = torch.ones(VOCABULARY, dtype=torch.bool)
        forbidden[allow.allowed] = False
        assert (scores[:, forbidden] == NEVER).all()


def test_a_plain_list_of_processors_works_as_it_does_on_the_base(model):
    found = sample(model, prompts(), max_new_tokens=4, logits_processor=[Allow([9, 10])], **ENDLESS)
    assert set(found[:, 5:].flatten().tolist()) <= {9, 10}


def test_bad_words_never_come_back(model):
    found = model.generate(prompts(6), max_new_tokens=12, bad_words_ids=[[t] for t in range(3, 80)], **ENDLESS)
    assert not set(found[:, 5:].flatten().tolist()) & set(range(3, 80))


def test_guidance_scale_keeps_the_hidden_state_of_the_main_pass(model):
    found = sample(model, prompts(), max_new_tokens=6, guidance_scale=2.0, **TRACED, **ENDLESS)
    hidden, _ = hidden_and_logits(model, found.sequences[:, :-1])
    for step in range(6):
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden[:, 4 + step])
        assert torch.allclose(found.decoding_trace.temperature[:, step], temperature, atol=1e-5)
        assert torch.allclose(found.decoding_trace.top_p[:, step], top_p, atol=1e-5)


class Peek(LogitsProcessor):
    """Runs the model itself on something else, as contrastive and guided methods do."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        self.model(prompts(len(scores), 4, seed=77))
        self.model.generate(prompts(1, 3, seed=78), max_new_tokens=2, do_sample=False)
        return scores


def test_a_processor_that_runs_the_model_does_not_change_what_is_sampled(model):
    expected = sample(model, prompts(), max_new_tokens=6, **TRACED)
    found = sample(model, prompts(), max_new_tokens=6, logits_processor=LogitsProcessorList([Peek(model)]), **TRACED)
    assert_same_output(found, expected, exactly=True)
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, equal_nan=True)


def test_renormalised_scores_are_log_probabilities(model):
    found = sample(model, prompts(), max_new_tokens=4, renormalize_logits=True, **DICT)
    for scores in found.scores:
        assert torch.allclose(scores.exp().sum(-1), torch.ones(3), atol=1e-5)


def test_inputs_embeds_continue_as_their_tokens_do(model):
    embeddings = model.get_input_embeddings()(prompts())
    expected = sample(model, prompts(), max_new_tokens=6, **TRACED, **ENDLESS)
    found = sample(model, inputs_embeds=embeddings, max_new_tokens=6, **TRACED, **ENDLESS)
    assert torch.equal(found.sequences, expected.sequences[:, 5:])
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"logits_to_keep": 0}],
    ids=str,
)
def test_how_the_forward_pass_is_run_changes_nothing(model, mode):
    expected = sample(model, prompts(), max_new_tokens=8, **TRACED, **ENDLESS)
    found = sample(model, prompts(), max_new_tokens=8, **mode, **TRACED, **ENDLESS)
    assert_same_output(found, expected, atol=1e-4)
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, atol=1e-5)


def test_generation_goes_on_from_a_cache(model):
    first = sample(model, prompts(), max_new_tokens=3, **DICT, **ENDLESS)
    settings = {"max_new_tokens": 4, **TRACED, **ENDLESS}
    expected = sample(model, first.sequences, seed=3, **settings)
    found = sample(model, first.sequences, seed=3, past_key_values=first.past_key_values, **settings)
    assert_same_output(found, expected, atol=1e-4)
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, atol=1e-5)


def test_the_ways_of_passing_a_prompt_agree(model):
    expected = sample(model, prompts(), max_new_tokens=5, **TRACED)
    mask = torch.ones_like(prompts())
    for given in ({"inputs": prompts()}, {"input_ids": prompts()}, {"input_ids": prompts(), "attention_mask": mask}):
        found = sample(model, max_new_tokens=5, **given, **TRACED)
        assert_same_output(found, expected, exactly=True)
        assert torch.equal(found.decoding_trace.top_p.isnan(), expected.decoding_trace.top_p.isnan())


def test_without_a_prompt_generation_starts_at_bos(model):
    found = sample(model, max_new_tokens=4, **TRACED, **ENDLESS)
    assert found.sequences.shape == (1, 5)
    assert found.decoding_trace.temperature.shape == (1, 4)
    assert torch.isfinite(found.decoding_trace.temperature).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_sample_with_fp32_parameters(model, dtype):
    found = sample(model.to(dtype), prompts(), max_new_tokens=4, **TRACED, **ENDLESS)
    assert found.decoding_trace.temperature.dtype == torch.float32
    assert found.scores[0].dtype == torch.float32
    assert torch.isfinite(found.decoding_trace.temperature).all()


@pytest.mark.parametrize("precision", ["bf16 base, fp32 heads", "autocast"])
def test_mixed_precision_works(model, precision):
    if precision == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = sample(model, prompts(), max_new_tokens=4, **TRACED, **ENDLESS)
    else:
        adapter = model.decoding_adapter
        model = tiny.wrap(tiny.build_base().to(torch.bfloat16))
        model.decoding_adapter.load_state_dict(adapter.state_dict())
        found = sample(model, prompts(), max_new_tokens=4, **TRACED, **ENDLESS)
    assert found.decoding_trace.temperature.dtype == torch.float32


def test_lora_goes_on_top(model):
    peft = pytest.importorskip("peft")
    expected = sample(model, prompts(), max_new_tokens=6, **TRACED, **ENDLESS)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    # A fresh LoRA adds exactly nothing, so the adaptive model below it samples as before.
    found = sample(tuned, input_ids=prompts(), max_new_tokens=6, **TRACED, **ENDLESS)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(found.decoding_trace.temperature, expected.decoding_trace.temperature, atol=1e-6)


# --- nothing stays behind --------------------------------------------------------------------------------------------


def test_a_call_leaves_no_hook_and_no_session(model):
    model.generate(prompts(), max_new_tokens=2)
    assert hooks_left(model) == 0
    assert current_call() is None


@pytest.mark.parametrize(
    ("interruption", "error"),
    [
        ({"streamer": Collect(fail_at=7)}, RuntimeError),
        ({"stopping_criteria": StoppingCriteriaList([StopAt(8, KeyboardInterrupt)])}, KeyboardInterrupt),
        ({"logits_processor": [Follow(torch.zeros(1, 2, dtype=torch.long), 5)]}, IndexError),
        ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedGenerationError),
        ({"no_such_setting": 3}, ValueError),
    ],
    ids=["streamer", "ctrl-c", "processor", "refused", "unknown setting"],
)
def test_an_interrupted_call_leaves_the_next_one_right(model, interruption, error):
    expected = sample(model, prompts(1), max_new_tokens=6, **TRACED)
    with pytest.raises(error):
        sample(model, prompts(1), max_new_tokens=9, eos_token_id=None, **interruption)
    assert hooks_left(model) == 0
    assert current_call() is None
    found = sample(model, prompts(1), max_new_tokens=6, **TRACED)
    assert_same_output(found, expected, exactly=True)
    assert torch.equal(found.decoding_trace.temperature, expected.decoding_trace.temperature)


def test_threads_on_one_model_do_not_hear_each_other(model):
    jobs = [(prompts(2, 5 + i, seed=i), prompts(2, 12, seed=50 + i)) for i in range(4)]
    alone = [trace_along(model, *job) for job in jobs]
    found: list = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        found[index] = trace_along(model, *jobs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(found, alone, strict=True):
        assert torch.allclose(ours.temperature, expected.temperature, atol=1e-6)
        assert torch.allclose(ours.top_p, expected.top_p, atol=1e-6)
    assert hooks_left(model) == 0


class Nest(BaseStreamer):
    def __init__(self, model):
        self.model, self.inner = model, []

    def put(self, value):
        with torch.random.fork_rng():
            self.inner.append(sample(self.model, prompts(2, 3, seed=8), budget=[1, 2], **ENDLESS))

    def end(self):
        pass


def test_a_generate_call_within_a_generate_call(model):
    settings = {"max_new_tokens": 6, **TRACED, **ENDLESS}
    expected = sample(model, prompts(1), **settings)
    nest = Nest(model)
    found = sample(model, prompts(1), streamer=nest, **settings)
    assert_same_output(found, expected, exactly=True)
    assert torch.equal(found.decoding_trace.temperature, expected.decoding_trace.temperature)
    assert len({tuple(inner.flatten().tolist()) for inner in nest.inner}) == 1
    assert hooks_left(model) == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_broken_logits_raise_with_step_and_row(model, value, step):
    class Break(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 5 + step:
                scores = scores.clone()
                scores[1, 7] = value
            return scores

    with pytest.raises(LogitsError, match=rf"step {step}.*row 1") as caught:
        model.generate(prompts(), max_new_tokens=5, logits_processor=[Break()], **ENDLESS)
    assert isinstance(caught.value, AdaptiveDecodeError)
    assert isinstance(caught.value, ValueError)
    assert hooks_left(model) == 0


def test_a_row_with_nothing_left_to_sample_raises(model):
    with pytest.raises(LogitsError, match=r"step 0.*row 0"):
        model.generate(prompts(), max_new_tokens=2, suppress_tokens=list(range(VOCABULARY)))


def test_a_model_with_nan_weights_raises(model):
    model.get_output_embeddings().weight.data[3] = float("nan")
    with pytest.raises(LogitsError, match=r"step 0.*row 0.*NaN"):
        model.generate(prompts(), max_new_tokens=2)


REFUSED = {
    "penalty_alpha": 0.6,
    "dola_layers": "high",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_mode_in_which_the_adapter_cannot_act_is_refused(model, name):
    with tiny.counted_forwards(model) as calls, pytest.raises(UnsupportedGenerationError) as caught:
        model.generate(prompts(1), max_new_tokens=4, **{name: REFUSED[name]})
    assert isinstance(caught.value, AdaptiveDecodeError)
    assert isinstance(caught.value, ValueError)
    assert "disable_adapter" in str(caught.value)
    assert not calls


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("where", ["generation_config argument", "the model's generation_config"])
def test_a_refused_mode_is_refused_or_off_wherever_it_was_set(model, name, where):
    expected = sample(model, prompts(1), max_new_tokens=4, **TRACED)
    if where == "generation_config argument":
        with pytest.raises(UnsupportedGenerationError):
            model.generate(prompts(1), generation_config=GenerationConfig(max_new_tokens=4, **{name: REFUSED[name]}))
        return
    setattr(model.generation_config, name, REFUSED[name])
    try:
        found = sample(model, prompts(1), max_new_tokens=4, **TRACED)
    except ValueError:  # ours, or transformers' own for a mode that needs remote code
        return
    assert_same_output(found, expected, exactly=True)


def test_a_model_whose_vocabulary_was_resized_says_so_or_works(model):
    model.resize_token_embeddings(VOCABULARY + 8)
    try:
        found = model.generate(prompts(), max_new_tokens=3, **TRACED, **ENDLESS)
    except AdaptiveDecodeError:
        return
    assert torch.isfinite(found.decoding_trace.temperature).all()


def test_a_config_prepared_while_the_adapter_is_disabled_keeps_the_bases_defaults(model):
    model.generation_config.temperature = 0.3
    with model.disable_adapter():
        kept, _ = model._prepare_generation_config(None)
    forgotten, _ = model._prepare_generation_config(None)
    assert (kept.temperature, forgotten.temperature) == (0.3, None)
