"""`python -m hf_adaptive_decode.serve`: transformers' own server, asked over HTTP, samples as the adapter decides."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from greedy_adapter import PROMPT, save_greedy_adapter

from hf_adaptive_decode.testbed import load_base_model, load_tokenizer

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)

REPOSITORY = Path(__file__).parent.parent
NEW_TOKENS = 24
SEEDS = range(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_greedy_adapter(tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def serving(folder, *options):
    """Yields what sends a request to a server in a process of its own, and gives the body of the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "hf_adaptive_decode.serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen([*command, *options], env=environment, **output)
    address = f"http://127.0.0.1:{port}"

    def ask(path="/v1/chat/completions", **body):
        asked = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT + " "}
        body = {"model": str(folder), "max_tokens": NEW_TOKENS, **asked, **body}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read().decode()

    try:
        _wait_for(server, f"{address}/health")
        yield ask
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def ask(folder):
    with serving(folder) as ask:
        yield ask


def _wait_for(server, address):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, server.communicate()[0]
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(address, timeout=5)
            return
        time.sleep(0.1)
    raise AssertionError("the server did not come up")


@pytest.fixture(scope="module")
def greedy_text():
    tokenizer = load_tokenizer()
    batch = tokenizer(PROMPT + " ", return_tensors="pt")
    with torch.no_grad():
        ids = load_base_model().generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def text_of(answer: str) -> str:
    (choice,) = json.loads(answer)["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text.removeprefix(PROMPT).replace("<eos>", "").strip()


def test_the_adapter_decides_and_the_seed_does_not(ask, greedy_text):
    found = {text_of(ask(seed=seed)) for seed in SEEDS}
    assert found == {greedy_text}


def test_a_requests_temperature_beats_the_adapter_even_if_it_is_the_bases_own(ask, greedy_text):
    """The base gives the greedy text in 42 % of its samples at T = 1, so all of eight seeds in 0.1 %."""
    found = {text_of(ask(seed=seed, temperature=1.0)) for seed in SEEDS}
    assert found != {greedy_text}
    assert {text_of(ask(temperature=0.0))} == {greedy_text}


def test_a_stream_brings_the_same_text_in_parts(ask, greedy_text):
    lines = [line.removeprefix("data: ") for line in ask(stream=True).splitlines() if line.startswith("data: {")]
    parts = [choice["delta"].get("content") for line in lines for choice in json.loads(line)["choices"]]
    parts = [part for part in parts if part]
    assert len(parts) > 3
    assert "".join(parts).removeprefix(PROMPT).replace("<eos>", "").strip() == greedy_text


def test_plain_completions_are_served_too(ask, greedy_text):
    assert {text_of(ask("/v1/completions", seed=seed)) for seed in SEEDS} == {greedy_text}


def test_the_adapter_decides_in_continuous_batches_too(folder, greedy_text):
    # By default the cache takes most of the memory that there is.
    small = ["--cb-num-blocks", "24", "--cb-max-batch-tokens", "32"]
    with serving(folder, "--continuous-batching", *small) as ask, ThreadPoolExecutor(4) as pool:
        found = set(map(text_of, pool.map(lambda seed: ask(seed=seed), SEEDS)))
    assert found == {greedy_text}
