"""`vllm serve ADAPTER` in a process of its own answers the OpenAI client, and refuses what would fight the adapter."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import openai
import pytest
from greedy_adapter import PROMPT, save_greedy_adapter
from served import running_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_greedy_adapter(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """`(client, address, log)` of a server on a free port."""
    options = ["--max-model-len", "128", "--served-model-name", "adapter", "--max-num-seqs", "8"]
    with running_server(folder, tmp_path_factory.mktemp("log") / "server.log", *options) as (address, log):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address, log


def complete(client, **body):
    found = client.completions.create(model="adapter", prompt=PROMPT, max_tokens=16, **body)
    return [choice.text for choice in found.choices]


def chat(client, **body):
    messages = [{"role": "user", "content": PROMPT}]
    found = client.chat.completions.create(model="adapter", messages=messages, max_tokens=16, **body)
    return [choice.message.content for choice in found.choices]


@pytest.mark.parametrize("ask", [complete, chat])
def test_the_adapter_decides_unless_a_request_opts_out(server, ask):
    client, _, _ = server
    greedy = ask(client, temperature=0)[0]
    assert ask(client) == [greedy]
    assert set(ask(client, n=4, extra_body={"vllm_xargs": {"parallel_budget": 4}})) == {greedy}
    # The base is unsure of this prompt: eight samples at temperature 1 that all are the greedy one do not happen.
    opted_out = ask(client, n=8, seed=0, extra_body={"vllm_xargs": {"adaptive_decoding": False}})
    assert len(set(opted_out)) > 1


def test_streams_and_grammars(server):
    client, _, _ = server
    parts = client.completions.create(model="adapter", prompt=PROMPT, max_tokens=16, stream=True)
    assert "".join(part.choices[0].text for part in parts) == complete(client)[0]
    found = complete(client, extra_body={"structured_outputs": {"regex": "[0-9]{3,9}"}})[0]
    assert re.fullmatch("[0-9]{3,9}", found.replace(" ", ""))


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"temperature": 0.5}, "`temperature` is 0.5, and the adapter decides"),
        ({"top_p": 0.5}, "`top_p` is 0.5"),
        ({"extra_body": {"top_k": 7}}, "`top_k` is 7"),
        ({"extra_body": {"min_p": 0.2}}, "`min_p` is 0.2"),
        ({"extra_body": {"vllm_xargs": {"token_budget": -3}}}, "`token_budget` is -3"),
    ],
)
def test_what_would_fight_the_adapter_is_refused(server, ask, body, reason):
    client, _, _ = server
    with pytest.raises(openai.BadRequestError, match=re.escape(reason)) as refused:
        ask(client, **body)
    assert refused.value.status_code == 400


def test_what_was_decided_is_logged_or_kept_under_a_tag(server):
    client, address, log = server
    complete(client, extra_body={"vllm_xargs": {"decoding_trace": True}})
    complete(client, extra_body={"vllm_xargs": {"decoding_trace": "mine"}})
    body = json.dumps({"method": "take_decoding_traces", "args": [["mine"]]}).encode()
    request = urllib.request.Request(f"{address}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        records = json.load(response)["results"][0]["mine"]
    assert len(records) == 1
    assert set(records[0]["temperature"]) == {0.0}
    assert set(records[0]["action"]) == {0}
    complete(client)  # the step in which the engine learns that the request before has left
    lines = [line for line in log.read_text().splitlines() if "decoding trace: " in line]
    assert len(lines) == 1
    logged = json.loads(lines[0].split("decoding trace: ")[1])
    assert logged["temperature"] == records[0]["temperature"]
