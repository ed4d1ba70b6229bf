"""Training in several processes, however the base lies in them, is training in one."""

from importlib.util import find_spec

import process_runs
import pytest
import reinforce_runs
import torch
from safetensors.torch import load_file

# As Adam would blow up the rounding of sums that run in another order.
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "save_strategy": "no", "logging_steps": 1}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
STRATEGIES = ["ddp", "fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]


@pytest.fixture(scope="module")
def processes():
    return reinforce_runs.context("process_runs")


def adapter(folder, rank, of):
    return load_file(folder / f"adapter-{rank}-of-{of}.safetensors")


def assert_near(one, other, atol=1e-6):
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=atol, msg=name)


def timeless(entries):
    """Logged means, without what a clock measured."""
    clock = ("runtime", "per_second", "seconds/", "preparation_time", "flos")
    return [{name: value for name, value in entry.items() if not any(c in name for c in clock)} for entry in entries]


def assert_one(processes, what, strategy, folder, options, batch=4):
    """Two processes end with the adapter of one that has twice the batch, and log the same means."""
    options = {**PLAIN, **options}
    (alone,) = process_runs.together(
        processes, what, strategy, 1, folder / "alone", {**options, "per_device_train_batch_size": 2 * batch}
    )
    pair = process_runs.together(
        processes, what, strategy, 2, folder / "pair", {**options, "per_device_train_batch_size": batch}
    )
    expected = adapter(folder / "alone", 0, 1)
    for rank in range(2):
        assert_near(expected, adapter(folder / "pair", rank, 2))
    assert_near(expected, load_file(folder / "pair" / "saved" / "model.safetensors"))
    for whole, *both in zip(*(timeless(found["log"]) for found in (alone, *pair)), strict=True):
        for entry in both:
            assert set(whole) == set(entry)
            for name, value in whole.items():
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    return alone, pair


HEADS = {
    "defaults": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 3},
    # Of 13 examples the last 5 are 4 in one process and 1 in the other; of 9 the last one is nobody's but the first's.
    "a short end": {"rows": 13, "max_steps": 4},
    "nothing in one": {"rows": 9, "max_steps": 4, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads_learn_in_two_processes_what_they_learn_in_one(options, strategy, processes, tmp_path):
    assert_one(processes, "heads", strategy, tmp_path, options)


TOKENS, SEQUENCES = {"policy_dropout": 0.0}, {"policy": "sequence_actions", "policy_dropout": 0.0}
POLICIES = {
    "tokens": {"policy": TOKENS, "final_learning_rate_ratio": None, "max_steps": 3},
    "a short end": {"policy": SEQUENCES, "rows": 13, "max_steps": 4, "baseline": "batch", "kl_coef": 0.5},
    "nothing in one": {"policy": TOKENS, "rows": 9, "max_steps": 4, "baseline": "ema", "entropy_coef": 0.3},
    "filtered before": {"policy": TOKENS, "scenario": "idle", "prefilter_samples": 5, "prefilter_range": [0.2, 0.6]},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_policies_learn_in_two_processes_what_they_learn_in_one(options, strategy, processes, tmp_path):
    alone, pair = assert_one(processes, "policy", strategy, tmp_path, options)
    assert alone["prompts"] == pair[0]["prompts"] == pair[1]["prompts"]
    # Both rewarded prompts: no process waits for the other's rollouts.
    assert all(found["heard"] for found in pair)
    assert not {pid for _, _, pid in pair[0]["heard"]} & {pid for _, _, pid in pair[1]["heard"]}
