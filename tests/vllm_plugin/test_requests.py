"""What requests may ask of an engine with an adapter: seeds, opting out, traces, new weights, grammars; what not."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch
from safetensors.torch import save_file
from served import (
    ACTIONS,
    Asked,
    Truth,
    adapter_folder,
    base_folder,
    differences,
    engine,
    full_logprobs,
    run,
    sampling,
    spread_out,
)
from vllm.exceptions import VLLMValidationError

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.serving.client import load_adapter, take_traces
from hf_adaptive_decode.testbed import load_base_model

PROMPTS = tiny.prompts(8, 9, seed=11).tolist()


def constant_heads(folder, temperature, top_p, base=None):
    model = AutoDecoForCausalLM.from_base(base or base_folder(), AutoDecoConfig())
    heads = model.decoding_adapter.temperature_head, model.decoding_adapter.top_p_head
    for head, share in zip(heads, (temperature / 2, top_p), strict=True):
        torch.nn.init.zeros_(head.out.weight)
        torch.nn.init.constant_(head.out.bias, math.log(share / (1 - share)))
    model.save_pretrained(folder)
    return folder


def tokens_of(outputs):
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def test_constant_heads_are_stock_sampling_token_for_token(tmp_path):
    adapter = constant_heads(tmp_path / "constant", 0.7, 0.9)
    llm, stock = engine(adapter), engine(base_folder(), alone=False)
    fixed = {"temperature": 0.7, "top_p": 0.9}
    cases = [
        ([Asked(p, {"seed": n, "n": 2}) for n, p in enumerate(PROMPTS)], fixed),
        ([Asked(p, {"temperature": 0}) for p in PROMPTS], {}),
        ([Asked(p, {"seed": n, "extra_args": {"adaptive_decoding": False}}) for n, p in enumerate(PROMPTS)], {}),
    ]
    for asked, static in cases:
        found, wanted = run(llm, asked), run(stock, [Asked(a.prompt, a.params | static) for a in asked])
        assert tokens_of(found) == tokens_of(wanted)
        for one, other in zip(found, wanted, strict=True):
            difference, mismatched = differences(full_logprobs(one.outputs[0]), full_logprobs(other.outputs[0]))
            assert (difference <= 1e-4, mismatched) == (True, 0)


def test_the_bases_own_sampling_values_are_no_defaults(tmp_path):
    llm = engine(constant_heads(tmp_path / "constant", 0.7, 0.9))
    default = llm.get_default_sampling_params()
    assert (default.temperature, default.top_p, default.top_k) == (1.0, 1.0, 0)


@pytest.fixture(scope="module")
def token_actions():
    return engine(adapter_folder("token_actions"))


def test_a_seeded_request_does_not_depend_on_its_neighbours(token_actions):
    asked = [Asked(p, {"seed": n, "extra_args": {"decoding_trace": f"a{n}"}}) for n, p in enumerate(PROMPTS)]
    together = tokens_of(run(token_actions, asked))
    alone = [tokens_of(run(token_actions, [one]))[0] for one in asked[:3]]
    assert alone == together[:3]
    assert tokens_of(run(token_actions, [Asked(a.prompt, a.params | {"seed": 99}) for a in asked])) != together


def test_actions_are_drawn_as_the_policy_says(token_actions):
    asked = [
        Asked(p, {"max_tokens": 30, "n": 4, "logprobs": None, "extra_args": {"decoding_trace": f"d{n}"}})
        for n, p in enumerate(tiny.prompts(12, 8, seed=21).tolist())
    ]
    outputs, truth = run(token_actions, asked), Truth(adapter_folder("token_actions"))
    traces = take_traces(token_actions, [one.extra["decoding_trace"] for one in asked])
    taken, expected, variance = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for one, output in zip(asked, outputs, strict=True):
        for trace, completion in zip(traces[one.extra["decoding_trace"]], output.outputs, strict=True):
            p = truth.action_probabilities(one, list(completion.token_ids)).detach()
            taken += torch.bincount(trace.parameters.action, minlength=4)
            expected, variance = expected + p.sum(0), variance + (p * (1 - p)).sum(0)
    # Four sums of 1440 draws, each within 4.5 deviations: by chance beyond once in 37,000 runs.
    assert ((taken - expected).abs() <= 4.5 * variance.sqrt()).all(), (taken, expected)


def test_a_trace_tells_what_was_decided_and_what_the_policy_saw(token_actions):
    extra = {"decoding_trace": "seen", "decoding_observation": True, "token_budget": 20}
    one = Asked(PROMPTS[0], {"n": 2, "extra_args": extra})
    output = run(token_actions, [one])[0]
    traces = take_traces(token_actions, ["seen", "unknown"])
    assert traces["unknown"] == []
    assert len(traces["seen"]) == 2
    truth = Truth(adapter_folder("token_actions"))
    for trace, completion in zip(traces["seen"], output.outputs, strict=True):
        ids = torch.tensor([[*one.prompt, *completion.token_ids]])
        hidden, _ = tiny.hidden_and_logits(truth.model, ids)
        torch.testing.assert_close(trace.observation.context, hidden[0, len(one.prompt) - 1 : -1], atol=2e-4, rtol=1e-3)
        assert trace.observation.remaining_tokens.tolist() == list(range(20, 8, -1))
        chosen = [ACTIONS[action] for action in trace.parameters.action.tolist()]
        for name, off in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            wanted = torch.tensor([float(action.get(name, off)) for action in chosen])
            torch.testing.assert_close(getattr(trace.parameters, name).float(), wanted)
    assert take_traces(token_actions, ["seen"]) == {"seen": []}


def test_new_weights_reach_a_running_engine(token_actions, tmp_path):
    asked = [Asked(p, {"seed": n, "extra_args": {"decoding_trace": str(n)}}) for n, p in enumerate(PROMPTS)]
    before = tokens_of(run(token_actions, asked))
    model = AutoDecoForCausalLM.from_pretrained(adapter_folder("token_actions"), base_folder())
    spread_out(model, seed=5)
    model.save_pretrained(tmp_path / "newer")
    load_adapter(token_actions, tmp_path / "newer")
    after = tokens_of(run(token_actions, asked))
    assert after != before
    assert tokens_of(run(engine(tmp_path / "newer", alone=False), asked)) == after
    load_adapter(token_actions, adapter_folder("token_actions") / "model.safetensors")
    assert tokens_of(run(token_actions, asked)) == before
    other = adapter_folder("static")
    with pytest.raises(ValueError, match="other settings than the one that is served"):
        load_adapter(token_actions, other)
    save_file({"nonsense": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="nonsense is unexpected"):
        load_adapter(token_actions, tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.5}, "`temperature` is 0.5, and the adapter decides"),
        ({"top_p": 0.9}, "`top_p` is 0.9"),
        ({"top_k": 5}, "`top_k` is 5"),
        ({"min_p": 0.1}, "`min_p` is 0.1"),
        ({"extra_args": {"token_budget": 0}}, "`token_budget` is 0"),
        ({"extra_args": {"token_budget": "ten"}}, "`token_budget` is 'ten'"),
        ({"extra_args": {"parallel_budget": 2.5}}, "`parallel_budget` is 2.5"),
        ({"extra_args": {"adaptive_decoding": "perhaps"}}, "`adaptive_decoding` is 'perhaps'"),
        ({"extra_args": {"decoding_observation": True}}, "`decoding_observation` needs a tag"),
    ],
)
def test_what_would_fight_the_adapter_is_refused(token_actions, params, message):
    with pytest.raises(VLLMValidationError, match=re.escape(message)):
        token_actions.generate([{"prompt_token_ids": PROMPTS[0]}], sampling(**params), use_tqdm=False)


def test_several_samples_need_their_number_where_the_policy_reads_it():
    llm = engine(adapter_folder("sequence_actions"))
    with pytest.raises(VLLMValidationError, match=re.escape('pass `vllm_xargs={"parallel_budget": 3}`')):
        run(llm, [Asked(PROMPTS[0], {"n": 3})])
    run(llm, [Asked(PROMPTS[0], {"n": 3, "extra_args": {"parallel_budget": 3}})])
    run(llm, [Asked(PROMPTS[0], {"n": 3, "extra_args": {"adaptive_decoding": False}})])


@pytest.mark.parametrize(
    "overrides",
    [
        lambda adapter: {"decoding_adapter": str(adapter)},
        lambda adapter: {
            "architectures": ["AutoDecoQwen3ForCausalLM"],
            "decoding_adapter": {"path": str(adapter)},
        },
    ],
)
def test_the_base_with_an_adapter_named_beside_it(overrides):
    adapter = adapter_folder("heads")
    llm = engine(base_folder(), hf_overrides=overrides(adapter))
    one = Asked(PROMPTS[0])
    completion = run(llm, [one])[0].outputs[0]
    wanted = Truth(adapter).logprobs(one, list(completion.token_ids), None)
    difference, mismatched = differences(full_logprobs(completion), wanted)
    assert difference <= 1e-3
    assert mismatched == 0


def test_another_base_can_be_named(tmp_path):
    adapter = adapter_folder("heads")
    folder = tmp_path / "moved"
    model = AutoDecoForCausalLM.from_pretrained(adapter, base_folder())
    model.decoding_configs["default"].base_model_name_or_path = "/nowhere/at/all"
    model.save_pretrained(folder)
    llm = engine(folder, hf_overrides={"base_model": str(base_folder())})
    assert len(tokens_of(run(llm, [Asked(PROMPTS[0])]))[0]) == 12


def test_adapters_that_vllm_cannot_serve_are_refused_with_the_reason(tmp_path):
    actions = {"policy": "sequence_actions", "actions": ACTIONS, "pooling": "mean"}
    model = AutoDecoForCausalLM.from_base(base_folder(), AutoDecoConfig(**actions))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads the mean over the prompt"):
        engine(tmp_path)
    with pytest.raises(ValueError, match="V2 model runner alone"):
        engine(adapter_folder("heads"), speculative_config={"method": "ngram", "num_speculative_tokens": 2})


def test_a_grammar_holds_under_a_narrow_nucleus(tmp_path):
    from vllm.sampling_params import StructuredOutputsParams

    adapter = constant_heads(tmp_path / "narrow", 0.3, 0.02, load_base_model())
    llm = engine(adapter, skip_tokenizer_init=False)
    prompts = ["coin 4 7 47 - 11 =>", "run 42 - 10 + 3 =>"] * 3
    free = llm.generate(prompts, sampling(detokenize=True, ignore_eos=False), use_tqdm=False)
    assert not all(output.outputs[0].text.replace(" ", "").isdigit() for output in free)
    only_digits = StructuredOutputsParams(regex="[0-9]{3,9}")
    params = sampling(detokenize=True, ignore_eos=False, structured_outputs=only_digits, logprobs=None)
    for output in llm.generate(prompts, params, use_tqdm=False):
        assert 3 <= len(output.outputs[0].text.replace(" ", "")) <= 9
        assert output.outputs[0].text.replace(" ", "").isdigit()
