"""A vLLM server as an engine: the same draws as vLLM in this process, and rollouts whose policy stays here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from test_vllm_engine import ACTIONS, BUDGETS, PROMPTS, ids_of, policy_of, rows_of

from hf_adaptive_decode.engines.by_name import build_engine
from hf_adaptive_decode.engines.rollout import decode
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import BudgetError, UnsupportedGenerationError
from hf_adaptive_decode.testbed import BASE_MODEL_PATH, load_base_model, load_tokenizer


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--model", str(BASE_MODEL_PATH), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    words += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-seqs", "32", "--max-model-len", "256"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as answer:
                    assert json.load(answer)["data"]
                    break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def base():
    return load_base_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


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
