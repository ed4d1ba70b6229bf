"""A vLLM server as an engine: the same draws as vLLM in this process, and rollouts whose policy stays here."""

from __future__ import annotations

import pytest
import torch
from served import running_server
from test_vllm_engine import ACTIONS, BUDGETS, PROMPTS, ids_of, policy_of, rows_of

from hf_adaptive_decode.engines.by_name import build_engine
from hf_adaptive_decode.engines.rollout import decode
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import BudgetError, UnsupportedGenerationError
from hf_adaptive_decode.testbed import BASE_MODEL_PATH


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = ["--no-enable-chunked-prefill", "--max-num-seqs", "32", "--max-model-len", "256"]
    with running_server(BASE_MODEL_PATH, log, *options) as (address, _):
        yield address


def test_static_settings_and_a_sequence_policy_are_run_by_a_server(url, base, tokenizer):
    asked = {"token_budget": BUDGETS, "settings": {"temperature": 0.0}}
    engine = build_engine("vllm_server", base, tokenizer, url=url)
    assert ids_of(engine.complete(PROMPTS, **asked)) == ids_of(complete(base, tokenizer, PROMPTS, **asked))
    varied = {"token_budget": BUDGETS, "settings": {"temperature": 1.2, "top_p": 0.9}, "samples": 4}
    found = engine.complete(PROMPTS, **varied)
    assert ids_of(engine.complete(PROMPTS, **varied)) == ids_of(found)
    with build_engine("vllm", base, tokenizer) as here:
        assert ids_of(here.complete(PROMPTS, **varied)) == ids_of(found)

    policy = policy_of(base, policy="sequence_actions", actions=ACTIONS)
    rows = rows_of(tokenizer)
    theirs = decode(base, policy, rows, ends={tokenizer.eos_token_id}, pad=0, records="decisions").decisions
    completions, ours = engine.roll_out(policy, rows)
    assert torch.equal(ours.action, theirs.action)
    assert all(
        len(one.token_ids) <= budget for one, budget in zip(completions, rows.token_budget.tolist(), strict=True)
    )


def test_what_a_server_cannot_do_is_refused_with_the_reason(url, base, tokenizer):
    engine = build_engine("vllm_server", base, tokenizer, url=url)
    with pytest.raises(UnsupportedGenerationError, match='cannot draw as this "heads" policy says'):
        engine.complete(PROMPTS, policy=policy_of(base, policy="heads"))
    with pytest.raises(BudgetError, match="`max_model_len` is 256"):
        engine.complete(PROMPTS, token_budget=256)
    other = build_engine("vllm_server", base, tokenizer, url=url, served_model="another")
    with pytest.raises(UnsupportedGenerationError, match="no model 'another'"):
        other.complete(PROMPTS, token_budget=2)
