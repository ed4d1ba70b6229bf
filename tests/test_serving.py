"""What the vLLM plugin does without vLLM: settings of requests, what workers remember of them, and traces."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load

from hf_adaptive_decode import AutoDecoConfig
from hf_adaptive_decode.errors import AdapterLoadError, BudgetError, UnsupportedGenerationError
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.serving.plugin import base_architecture
from hf_adaptive_decode.serving.records import Recorder
from hf_adaptive_decode.serving.requests import RequestSettings, read_settings
from hf_adaptive_decode.serving.served import Rows, ServedAdapter, Steps, served_by
from hf_adaptive_decode.serving.source import source_in
from hf_adaptive_decode.types import Observation, SamplingParameters

ACTIONS = [{"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.8}, {"temperature": 1.5}]
WIDTH, VOCABULARY = 12, 30


def serve(policy="sequence_actions", engine="engine", **settings):
    config = AutoDecoConfig(policy=policy, actions=ACTIONS, hidden_size=WIDTH, vocab_size=VOCABULARY, **settings)
    return ServedAdapter(build_policy(config).eval(), "nowhere", engine, seed=0, device=torch.device("cpu"))


def rows_of(requests):
    return Rows(*torch.tensor([request.columns for request in requests]).T.unbind())


def steps_at(*tokens):
    tokens = torch.tensor(tokens)
    return Steps(tokens, tokens == 0)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (None, RequestSettings()),
        ({"somebody_elses": "x"}, RequestSettings()),
        ({"adaptive_decoding": 0}, RequestSettings(adaptive=False)),
        ({"adaptive_decoding": "false"}, RequestSettings(adaptive=False)),
        ({"token_budget": 7, "parallel_budget": 2}, RequestSettings(token_budget=7, samples=2)),
        ({"decoding_trace": 1}, RequestSettings(logs_trace=True)),
        ({"decoding_trace": "0"}, RequestSettings(trace="0")),
        ({"decoding_trace": "a", "decoding_observation": True}, RequestSettings(trace="a", observes=True)),
    ],
)
def test_settings_are_read(asked, wanted):
    assert read_settings(asked) == wanted


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"token_budget": 0}, BudgetError),
        ({"token_budget": True}, BudgetError),
        ({"parallel_budget": "2"}, BudgetError),
        ({"adaptive_decoding": "no"}, UnsupportedGenerationError),
        ({"adaptive_decoding": [1]}, UnsupportedGenerationError),
        ({"decoding_trace": 0.5}, UnsupportedGenerationError),
        ({"decoding_observation": True}, UnsupportedGenerationError),
    ],
)
def test_settings_that_mean_nothing_are_refused(asked, error):
    with pytest.raises(error, match=f"`{next(iter(asked))}`"):
        read_settings(asked)


def test_a_decision_that_is_made_once_outlives_a_reordered_batch():
    adapter = serve()
    requests = [adapter.request(RequestSettings(), 8, None, owner=number) for number in range(40)]
    hidden, logits = torch.randn(40, WIDTH), torch.randn(40, VOCABULARY)
    first = adapter.warp(logits.clone(), hidden, steps_at(*[0] * 40), rows_of(requests), inplace=True)
    order = torch.randperm(40)[:25]
    some = [requests[number] for number in order]
    later = adapter.warp(logits[order], torch.randn(25, WIDTH), steps_at(*[3] * 25), rows_of(some), inplace=False)
    assert torch.equal(later, first[order])
    assert len({tuple(row.isfinite().tolist()) for row in first}) > 2
    again = adapter.warp(logits[order], torch.randn(25, WIDTH), steps_at(*[0] * 25), rows_of(some), inplace=False)
    assert torch.equal(again, first[order])  # an untrained policy draws by the request's numbers alone


def test_draws_belong_to_a_request_and_its_step():
    hidden, logits = torch.randn(1, WIDTH).expand(64, -1), torch.randn(1, VOCABULARY).expand(64, -1)

    def sampled(adapter, seed):
        request = adapter.request(RequestSettings(), 64, seed, owner=None)
        return adapter.warp(logits, hidden, steps_at(*range(64)), rows_of([request] * 64), inplace=False)

    one, other = serve("token_actions"), serve("token_actions", engine="other")
    assert torch.equal(sampled(one, 5), sampled(other, 5))
    assert not torch.equal(sampled(one, 5), sampled(one, 6))
    assert not torch.equal(sampled(one, None), sampled(one, None))


def test_a_request_that_was_put_off_comes_back_to_its_own():
    adapter = serve()
    adapter.ids = {3: "a", 4: "b"}

    class Params:
        extra_args, max_tokens, seed = {"token_budget": 9}, 20, None

    mine, other = adapter.enter(3, Params), adapter.enter(4, Params)
    assert mine.slot.index != other.slot.index
    assert mine.budget == 9
    adapter.leave("a")
    adapter.leave("never was here")
    adapter.ids[7] = "a"
    assert adapter.enter(7, Params) is mine


def test_traces_keep_what_counted_and_forget_what_was_taken():
    recorder = Recorder()
    recorder.enter(5, RequestSettings(trace="mine", observes=True))
    recorder.enter(6, RequestSettings(trace="theirs"))
    recorder.enter(7, RequestSettings())

    def add(steps, counted, temperature):
        parameters = SamplingParameters(torch.tensor(temperature), top_p=0.9, action=torch.tensor([1, 2, 0]))
        seen = Observation(torch.tensor(temperature)[:, None], torch.tensor([4, 4, 4]))
        recorder.add(torch.tensor([5, 6, 7]), torch.tensor(steps), torch.tensor(counted), parameters, seen)

    add([0, 0, 0], [False, True, True], [9.0, 0.5, 0.1])
    add([0, 1, 1], [True, True, True], [0.25, 0.5, 0.1])
    add([1, 2, 2], [True, True, True], [7.0, 1.5, 0.1])
    add([1, 3, 3], [True, True, True], [0.75, 2.5, 0.1])  # the draft at step 1 was refused
    found = recorder.take(["mine", "theirs", "nobody's"])
    assert found["nobody's"] == []
    assert found["mine"][0]["temperature"] == [0.25, 0.75]
    assert found["mine"][0]["action"] == [1, 1]
    assert found["mine"][0]["top_p"] == pytest.approx([0.9, 0.9])
    assert found["mine"][0]["top_k"] == [0, 0]
    seen = load(found["mine"][0]["observation"])
    assert seen["context"].tolist() == [[0.25], [0.75]]
    assert seen["remaining_tokens"].tolist() == [4, 4]
    assert found["theirs"][0]["temperature"] == [0.5, 0.5, 1.5, 2.5]
    assert "observation" not in found["theirs"][0]
    assert recorder.take(["mine"]) == {"mine": []}


def test_nothing_is_kept_of_rows_that_are_not_traced():
    recorder = Recorder()
    recorder.enter(1, RequestSettings(trace="t"))
    recorder.leave(1)
    recorder.enter(2, RequestSettings())
    one = SamplingParameters(torch.tensor([0.5]))
    recorder.add(torch.tensor([2]), torch.tensor([0]), None, one, None)
    assert recorder._batches == []
    recorder.come_back(1)
    recorder.add(torch.tensor([1]), torch.tensor([4]), None, one, None)
    assert recorder.take(["t"])["t"][0]["temperature"] == [0.5]


def test_new_weights_are_of_the_same_policy(tmp_path):
    model = tiny.wrap(policy="token_actions", actions=ACTIONS)
    model.save_pretrained(tmp_path / "same")
    served = ServedAdapter(build_policy(model.decoding_config), "served", "weights", 0, torch.device("cpu"))
    served.load(str(tmp_path / "same"))
    served.load(str(tmp_path / "same" / "model.safetensors"))
    found, wanted = served.policy.state_dict(), model.decoding_adapter.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tiny.wrap(policy="token_actions", actions=ACTIONS[1:]).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterLoadError, match="has other settings than the one that is served, 'served'"):
        served.load(str(tmp_path / "other"))


def test_what_is_not_there_is_said():
    with pytest.raises(AdapterLoadError, match="without an adapter"):
        served_by("no such engine")
    with pytest.raises(AdapterLoadError, match="`decoding_adapter` is None"):
        source_in(type("Config", (), {})())
    adapter = serve(engine="rows")
    adapter.hear(torch.zeros(3, WIDTH))
    assert adapter.next_hidden(2).shape == (2, WIDTH)
    with pytest.raises(AdapterLoadError, match="2 rows of logits came without their hidden states"):
        adapter.next_hidden(2)


def test_adaptive_classes_are_named_for_their_base_and_the_versions():
    assert base_architecture("AutoDecoQwen3ForCausalLM_of_0_32_0_cpu_with_0_1_0") == "Qwen3ForCausalLM"
    assert base_architecture("Qwen3ForCausalLM") is None
