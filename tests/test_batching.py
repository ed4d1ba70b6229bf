"""Continuous batching with an adapter: every request is sampled as the adapter decides, however it is scheduled."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import EOS, PAD, hidden_and_logits
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopPLogitsWarper as TopP

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, Budget
from hf_adaptive_decode.errors import BudgetError, UnsupportedGenerationError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
# Fewer tokens a step than the prompts have: they are read in parts and mixed with requests that generate.
SMALL = {"num_blocks": 24, "page_size": 8, "max_batch_tokens": 8, "auto_switch_to_flash": False}


def batching(**settings) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{**SMALL, **settings})


def settings(**more) -> GenerationConfig:
    return GenerationConfig(**{"eos_token_id": -1, "pad_token_id": PAD, "max_new_tokens": 8, **more})


def run(model, prompts=PROMPTS, config=None, seed=0, how=None, **kwargs):
    torch.manual_seed(seed)
    how = batching(return_logprobs=True) if how is None else how
    return list(model.generate_batch(prompts, config or settings(), how, warmup=False, **kwargs).values())


def log_probability(logits: torch.Tensor, token: int, temperature: float, top_p: float) -> float:
    chain = [Temperature(temperature)] if temperature > 0 else []
    chain += [TopP(top_p)] if top_p < 1 else []
    scores = LogitsProcessorList(chain)(None, logits[None])[0]
    if temperature == 0:
        scores = torch.where(logits == logits.max(), 0.0, -float("inf"))
    return float(scores.log_softmax(-1)[token])


def assert_log_probabilities(model, outputs, decide) -> None:
    """`decide(hidden [N, H], step, output)` gives T and P; teacher-forced on what was generated."""
    for output in outputs:
        ids = torch.tensor([output.prompt_ids + output.generated_tokens])
        hidden, logits = hidden_and_logits(model, ids[:, :-1])
        for step, (token, found) in enumerate(zip(output.generated_tokens, output.logprobs, strict=True)):
            at = len(output.prompt_ids) - 1 + step
            temperature, top_p = decide(hidden[:, at], step, output)
            assert found == pytest.approx(log_probability(logits[0, at], token, temperature, top_p), abs=2e-3)


def by_heads(model):
    def decide(hidden, step, output):
        temperature, top_p = tiny.heads_by_hand(model.decoding_adapter, hidden)
        return float(temperature), float(top_p)

    return decide


# Not Gemma 2: in batches its attention is not capped, and the base's own log-probabilities are 0.03 from its forward's.
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gpt_oss", "opt"])
def test_every_request_is_sampled_as_the_heads_decide(family):
    model = tiny.randomise_heads(tiny.wrap(tiny.build_base(family)))
    outputs = run(model, budget=[8, 5, 8, 3])
    assert [len(output.generated_tokens) for output in outputs] == [8, 5, 8, 3]
    assert [output.prompt_ids for output in outputs] == PROMPTS
    assert_log_probabilities(model, outputs, by_heads(model))


@pytest.mark.parametrize("how", [{}, {"use_async_batching": False}, {"per_request_processors": True}], ids=str)
def test_an_identity_adapter_is_the_bases_own(identity, how):
    base = tiny.build_base()
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    expected = run(base, config=settings(**plain), how=batching(return_logprobs=True, **how))
    found = run(identity, how=batching(return_logprobs=True, **how))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.generated_tokens == theirs.generated_tokens
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_greedy_batches_are_the_bases_own(model):
    base = tiny.build_base()
    config = settings(do_sample=False)
    texts = [output.generated_tokens for output in run(model, config=config)]
    assert texts == [output.generated_tokens for output in run(base, config=settings(do_sample=False))]
    with model.disable_adapter():
        plain = settings(do_sample=True, temperature=0.7)
        disabled = run(model, config=plain)
    assert [o.generated_tokens for o in disabled] == [o.generated_tokens for o in run(base, config=plain)]


def test_what_the_config_sets_beats_the_adapter(model):
    outputs = run(model, config=settings(temperature=0.4))
    heads = by_heads(model)
    assert_log_probabilities(model, outputs, lambda *at: (0.4, heads(*at)[1]))


def test_a_request_may_fix_its_own_parameters(model):
    heads, found = by_heads(model), {}
    config = settings(max_new_tokens=6)
    manager = model.init_continuous_batching(config, batching(return_logprobs=True))
    manager.start()
    for name, own in (("a", {}), ("b", {"temperature": 0.3}), ("c", {"top_p": 0.5})):
        manager.add_request([5, 6, 7], request_id=name, max_new_tokens=6, eos_token_id=-1, **own)
    while len(found) < 3:
        output = manager.get_result(timeout=5)
        assert output is not None
        found[output.request_id] = output
    manager.stop(block=True)
    assert_log_probabilities(model, [found["a"]], heads)
    assert_log_probabilities(model, [found["b"]], lambda *at: (0.3, heads(*at)[1]))
    assert_log_probabilities(model, [found["c"]], lambda *at: (heads(*at)[0], 0.5))


def action_model(policy: str, actions, chooses, **config):
    settings = AutoDecoConfig(policy=policy, actions=actions, deterministic=True, **config)
    model = AutoDecoForCausalLM.from_base(tiny.build_base(), settings)
    model.decoding_adapter.action_logits = chooses
    return model


def test_b_t_is_what_is_left_of_each_requests_own_budget():
    """Hot while 3 or more tokens are left, greedy after; off by one in any way, a log-probability would not fit."""
    actions = [{"temperature": 0.0}, {"temperature": 1.5}]
    model = action_model(
        "token_actions",
        actions,
        lambda seen: torch.stack([(seen.remaining_tokens < 3).float(), (seen.remaining_tokens >= 3).float()], dim=-1),
    )
    budgets = [8, 5, 2, 3]
    outputs = run(model, budget=budgets)
    left = {tuple(prompt): budget for prompt, budget in zip(PROMPTS, budgets, strict=True)}

    def decide(hidden, step, output):
        return (1.5 if left[tuple(output.prompt_ids)] - step >= 3 else 0.0), 1.0

    assert_log_probabilities(model, outputs, decide)


def by_prompt(seen):
    """Action by the sign of a feature of the prompt: a fixed function of the hidden state, 2 for B above 2."""
    many = seen.parallel_samples > 2
    first = seen.context[:, 0] > 0
    return torch.stack([(~first).float(), first.float(), many.float() * 2], dim=-1)


@pytest.mark.parametrize("blocks", [24, 9], ids=["room for all", "requests are put off"])
def test_a_prompt_keeps_what_was_decided_at_its_first_step(blocks):
    actions = [{"temperature": 0.5}, {"temperature": 1.5, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.5}]
    model = action_model("sequence_actions", actions, by_prompt)
    outputs = run(model, budget=Budget(tokens=12, samples=2), how=batching(num_blocks=blocks, return_logprobs=True))
    assert len(outputs) == 8
    chosen = set()

    def decide(hidden, step, output):
        first, _ = hidden_and_logits(model, torch.tensor([output.prompt_ids]))
        action = actions[1] if float(first[0, -1, 0]) > 0 else actions[0]
        chosen.add(action["temperature"])
        return action["temperature"], action.get("top_p", 1.0)

    assert_log_probabilities(model, outputs, decide)
    assert len(chosen) == 2


def test_the_policy_is_told_how_many_samples_a_prompt_gets():
    actions = [{"temperature": 0.5}, {"temperature": 1.5, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.5}]
    model = action_model("sequence_actions", actions, by_prompt)
    outputs = run(model, PROMPTS[:2], budget=Budget(tokens=6, samples=3))
    assert len(outputs) == 6
    assert_log_probabilities(model, outputs, lambda *_: (1.0, 0.5))


def test_paged_generation_takes_padded_prompts_and_pads_what_it_returns(model):
    ids, mask = tiny.left_padded([torch.tensor(prompt) for prompt in PROMPTS])
    torch.manual_seed(0)
    found = model.generate(
        ids,
        attention_mask=mask,
        budget=[6, 2, 4, 3],
        cache_implementation="paged",
        continuous_batching_config=batching(),
        eos_token_id=-1,
        pad_token_id=PAD,
    )
    assert found.shape == (1, 4, 10)
    for row, prompt, budget in zip(found[0].tolist(), PROMPTS, [6, 2, 4, 3], strict=True):
        assert row[: len(prompt)] == prompt
        assert set(row[len(prompt) + budget :]) <= {PAD}


def test_what_a_batch_cannot_do_is_refused_before_anything_runs(model):
    for bad in (0, [1, 2], True):
        with pytest.raises(BudgetError):
            model.generate_batch(PROMPTS, settings(), batching(), budget=bad)
    paged = {"cache_implementation": "paged", "continuous_batching_config": batching()}
    with pytest.raises(UnsupportedGenerationError, match="adapter_names"):
        model.generate(torch.tensor([[5, 6]]), adapter_names=["default"], **paged)
    with pytest.raises(UnsupportedGenerationError, match="output_decoding_trace"):
        model.generate(torch.tensor([[5, 6]]), output_decoding_trace=True, return_dict_in_generate=True, **paged)
    mean = AutoDecoConfig(policy="sequence_actions", actions=[{"temperature": 1.0}], pooling="mean")
    pooled = AutoDecoForCausalLM.from_base(tiny.build_base(), mean)
    with pytest.raises(UnsupportedGenerationError, match="mean over the prompt"):
        pooled.generate_batch(PROMPTS, settings(), batching())


def test_nothing_stays_behind_and_the_next_calls_are_right(model):
    expected = tiny.sample(model, torch.tensor([[5, 6, 7]]), max_new_tokens=6, pad_token_id=PAD)
    run(model)
    assert tiny.hooks_left(model) == 0
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_request_samplers")
    assert torch.equal(tiny.sample(model, torch.tensor([[5, 6, 7]]), max_new_tokens=6, pad_token_id=PAD), expected)


def test_the_bases_config_is_not_changed(model):
    before = model.generation_config.to_dict()
    config = settings(do_sample=True, num_return_sequences=2)
    kept = config.to_dict()
    assert len(run(model, PROMPTS[:1], config=config)) == 2
    assert config.to_dict() == kept
    assert model.generation_config.to_dict() == before


def test_requests_end_at_the_eos_token(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = model.get_output_embeddings().weight[7] * 1.5
    outputs = run(model, config=settings(eos_token_id=EOS, max_new_tokens=40, do_sample=True))
    ended = [output for output in outputs if output.generated_tokens[-1] == EOS]
    assert ended
    assert_log_probabilities(model, outputs, by_heads(model))
