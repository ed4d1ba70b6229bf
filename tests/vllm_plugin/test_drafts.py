"""Speculative decoding in vLLM's second model runner: each drafted position is sampled as the adapter decides there."""

from __future__ import annotations

import os

import pytest
import tiny
from served import Asked, Truth, adapter_folder, engine, hold_against_truth, run

pytestmark = pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1", reason="the first runner refuses drafts, as another test holds"
)

NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.mark.parametrize("name", ["heads", "token_actions"])
def test_drafts_are_held_to_what_the_adapter_decides_at_each_of_them(name):
    adapter = adapter_folder(name)
    llm = engine(adapter, speculative_config=NGRAMS, disable_log_stats=False)
    # What repeats is drafted.
    prompts = [(row * 3)[:24] for row in tiny.prompts(4, 8, seed=31).tolist()]
    asked = [Asked(p, {"max_tokens": 25, "extra_args": {"decoding_trace": str(n)}}) for n, p in enumerate(prompts)]
    asked.append(Asked(prompts[0], {"max_tokens": 25, "extra_args": {"adaptive_decoding": False}}))
    outputs = run(llm, asked)
    drafted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert drafted["vllm:spec_decode_num_draft_tokens"] > 30
    hold_against_truth(Truth(adapter), llm, asked, outputs)
