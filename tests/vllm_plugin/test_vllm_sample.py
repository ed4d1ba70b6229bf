"""Sampling a data set by vLLM: right solutions as from transformers, as often, and an interrupted run goes on."""

from __future__ import annotations

import json

import pytest

from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.evaluation.store import CompletionStore
from hf_adaptive_decode.testbed import testbed_reward

FLAGS = ["--problems", "100", "--token-budget", "40", "--threads", "1", "--sampling", "T=1", "--samples", "8"]


def sample(folder, engine):
    assert main(["sample", "--output", str(folder), *FLAGS, "--engine", engine]) == 0
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "provenance.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sample(tmp_path_factory.mktemp("vllm") / "out", "vllm")


def test_it_keeps_right_solutions_as_often_as_transformers(whole, tmp_path):
    rows, facts = whole
    assert facts["engine"] == "vllm"
    for row in rows:
        assert testbed_reward([row["prompt"]], [f"{row['completion']} <eos>"]) == [1.0]
        assert row["tokens"] == len(row["completion"].split()) + 1
    _, of_transformers = sample(tmp_path / "out", "transformers")
    shares = [one["counts"]["verified"] / one["counts"]["sampled"] for one in (facts, of_transformers)]
    # 800 draws each: five standard errors of their difference, so one false alarm in two million.
    assert abs(shares[0] - shares[1]) < 5 * (0.5 / 800) ** 0.5
    assert facts["counts"]["sampled"] == of_transformers["counts"]["sampled"] == 800


def test_a_run_that_was_interrupted_goes_on_and_samples_nothing_twice(tmp_path, monkeypatch):
    """Within this process: vLLM does not survive a fork."""
    out, added, count = tmp_path / "out", CompletionStore.add, iter(range(1000))

    def add(self, lines):
        if next(count) == 3:
            raise KeyboardInterrupt
        added(self, lines)

    with monkeypatch.context() as patched:
        patched.setattr(CompletionStore, "add", add)
        assert main(["sample", "--output", str(out), *FLAGS, "--engine", "vllm"]) == 1
    kept = (out / "sampling" / "completions.jsonl").read_text()
    _, facts = sample(out, "vllm")
    lines = (out / "sampling" / "completions.jsonl").read_text()
    assert lines.startswith(kept)
    places = [(one["problem"], one["sample"]) for one in map(json.loads, lines.splitlines()) if "problem" in one]
    assert len(places) == len(set(places)) == facts["counts"]["sampled"]
