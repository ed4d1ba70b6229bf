"""Every token is sampled from what transformers says the adapter makes of it, whatever the engine is doing."""

from __future__ import annotations

import pytest
import tiny
from served import POLICIES, Asked, Truth, adapter_folder, engine, hold_against_truth, run

from hf_adaptive_decode.serving.client import take_traces

CASES = [*((name, "qwen3") for name in POLICIES), ("heads", "llama"), ("token_actions", "llama")]


def mixed_batch(tag: str) -> list[Asked]:
    """Long and short prompts, opt-outs, greedy rows, budgets, and several samples of one prompt."""
    short, long = tiny.prompts(6, 7, seed=1).tolist(), tiny.prompts(3, 90, seed=2).tolist()

    def extra(number, **more):
        return {"decoding_trace": f"{tag}-{number}", "parallel_budget": 3, **more}

    return [
        Asked(short[0], {"max_tokens": 9, "extra_args": extra(0)}),
        Asked(long[0], {"max_tokens": 6, "extra_args": extra(1)}),
        Asked(short[1], {"temperature": 0.7, "top_p": 0.8, "extra_args": {"adaptive_decoding": False}}),
        Asked(short[2], {"temperature": 0}),
        Asked(short[3], {"n": 3, "extra_args": extra(4)}),
        Asked(long[1], {"extra_args": extra(5, token_budget=20)}),
        Asked(long[0], {"max_tokens": 14, "extra_args": extra(6, token_budget=5)}),
        Asked(short[4], {"extra_args": {"adaptive_decoding": False}}),
        Asked(long[2], {"extra_args": extra(8)}),
    ]


@pytest.mark.parametrize(("name", "family"), CASES, ids=lambda value: value)
def test_a_mixed_batch_with_chunked_prefill_and_prefix_hits(name, family):
    adapter = adapter_folder(name, family)
    llm = engine(
        adapter,
        max_num_batched_tokens=48,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
    )
    truth = Truth(adapter, family)
    asked = mixed_batch("first")
    rows = hold_against_truth(truth, llm, asked, run(llm, asked))
    assert rows > 100
    again = mixed_batch("again")
    outputs = run(llm, again)
    assert sum(output.num_cached_tokens for output in outputs) >= 64 * 3
    hold_against_truth(truth, llm, again, outputs)


@pytest.mark.parametrize("name", ["sequence_actions", "token_actions", "mixture"])
def test_preempted_requests_go_on_as_they_were(name):
    adapter = adapter_folder(name)
    llm = engine(
        adapter,
        block_size=32,
        num_gpu_blocks_override=9,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    asked = [
        Asked(prompt, {"max_tokens": 90, "extra_args": {"decoding_trace": str(n), "parallel_budget": 2}})
        for n, prompt in enumerate(tiny.prompts(4, 20, seed=5).tolist())
    ]
    asked.append(
        Asked(asked[0].prompt, {"max_tokens": 70, "n": 2, "extra_args": asked[0].extra | {"decoding_trace": "n"}})
    )
    outputs = run(llm, asked)
    preemptions = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preemptions >= 2
    hold_against_truth(Truth(adapter), llm, asked, outputs)


def test_a_decision_that_is_made_once_holds_for_the_whole_sequence():
    adapter = adapter_folder("sequence_actions")
    llm = engine(adapter)
    prompts = tiny.prompts(16, 6, seed=7).tolist()
    asked = [Asked(p, {"extra_args": {"decoding_trace": str(n), "parallel_budget": 4}}) for n, p in enumerate(prompts)]
    run(llm, asked)
    taken = [found[0].parameters.action.unique() for found in take_traces(llm, [str(n) for n in range(16)]).values()]
    assert all(len(actions) == 1 for actions in taken)
    assert len({int(actions) for actions in taken}) > 1
