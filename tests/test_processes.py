"""Training in several processes, however the base lies in them, is training in one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import process_runs
import pytest
import reinforce_runs
import torch
from safetensors.torch import load_file

from hf_adaptive_decode import AutoDecoForCausalLM
from hf_adaptive_decode.cli.main import main

# As Adam would blow up the rounding of sums that run in another order.
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "save_strategy": "no", "logging_steps": 1}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def under(strategy, *values):
    marks = needs_deepspeed if strategy.startswith("zero") else ()
    return pytest.param(strategy, *values, id="-".join([strategy, *values]), marks=marks)


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


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    """What one process learns with some options: found once, however many are compared with it."""
    known = {}

    def found(what, options):
        key = (what, json.dumps(options, sort_keys=True))
        if key not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[key] = (*process_runs.together(processes, what, "ddp", 1, folder, options), adapter(folder, 0, 1))
        return known[key]

    return found


def assert_one(processes, alone, what, strategy, folder, options, batch=4):
    """Two processes end with the adapter of one that has twice the batch, and log the same means."""
    options = {**PLAIN, **options}
    single, expected = alone(what, {**options, "per_device_train_batch_size": 2 * batch})
    options = {**options, "per_device_train_batch_size": batch}
    pair = process_runs.together(processes, what, strategy, 2, folder, options)
    parts = 2 if strategy in ("fsdp2", "zero3") else 1
    for rank, found in enumerate(pair):
        assert found["held_adapter"] == single["held_adapter"]
        assert found["held_base"] == pytest.approx(single["held_base"] / parts, rel=0.01)
        assert_near(expected, adapter(folder, rank, 2))
    assert_near(expected, load_file(folder / "saved" / "model.safetensors"))
    for whole, *both in zip(*(timeless(found["log"]) for found in (single, *pair)), strict=True):
        for entry in both:
            assert set(whole) == set(entry)
            for name, value in whole.items():
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    return single, pair


HEADS = {
    "defaults": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 3},
    # Of 13 examples the last 5 are 4 in one process and 1 in the other; of 9 the last one is nobody's but the first's.
    "a short end": {"rows": 13, "max_steps": 4},
    "nothing in one": {"rows": 9, "max_steps": 4, "gradient_accumulation_steps": 2},
    # Prompts with commands, each of which is a forward pass of its own, are not in every batch of every process.
    "some commands": {"rows": 16, "commands_every": 5, "control_loss_weight": 2.0, "max_steps": 4},
}


EACH_HEADS = [
    *(under("ddp", case) for case in HEADS),
    *(under(strategy, case) for strategy in ("fsdp2", "zero3") for case in ("some commands", "nothing in one")),
    under("zero2", "accumulated"),
]


@pytest.mark.parametrize(("strategy", "case"), EACH_HEADS)
def test_heads_learn_in_two_processes_what_they_learn_in_one(strategy, case, alone, processes, tmp_path):
    single, pair = assert_one(processes, alone, "heads", strategy, tmp_path, HEADS[case])
    assert all(found.get("base_moved", []) == [] for found in (single, *pair))


TOKENS, SEQUENCES = {"policy_dropout": 0.0}, {"policy": "sequence_actions", "policy_dropout": 0.0}
POLICIES = {
    "tokens": {"policy": TOKENS, "final_learning_rate_ratio": None, "max_steps": 3},
    "a short end": {"policy": SEQUENCES, "rows": 13, "max_steps": 4, "baseline": "batch", "kl_coef": 0.5},
    "nothing in one": {"policy": TOKENS, "rows": 9, "max_steps": 4, "baseline": "ema", "entropy_coef": 0.3},
    "filtered before": {"policy": TOKENS, "scenario": "idle", "prefilter_samples": 5, "prefilter_range": [0.2, 0.6]},
}


EACH_POLICY = [
    *(under("ddp", case) for case in POLICIES),
    *(under(strategy, case) for strategy in ("fsdp2", "zero3") for case in ("nothing in one", "filtered before")),
    under("zero2", "tokens"),
]


@pytest.mark.parametrize(("strategy", "case"), EACH_POLICY)
def test_policies_learn_in_two_processes_what_they_learn_in_one(strategy, case, alone, processes, tmp_path):
    single, pair = assert_one(processes, alone, "policy", strategy, tmp_path, POLICIES[case])
    assert single["prompts"] == pair[0]["prompts"] == pair[1]["prompts"]
    # Both have rewarded prompts, and none of them twice.
    whole = [numbers for step, numbers in single["heard"] if step is not None]
    parts = [[numbers for step, numbers in found["heard"] if step is not None] for found in pair]
    assert all(parts)
    if case != "nothing in one":
        assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == whole


def test_every_process_has_its_rewards_in_workers(processes, tmp_path):
    options = {**PLAIN, "policy": TOKENS, "max_steps": 2, "per_device_train_batch_size": 4, "reward_timeout": 20.0}
    pair = process_runs.together(processes, "policy", "ddp", 2, tmp_path, options)
    workers = [tuple(map(int, path.name.split("-")[1:])) for path in tmp_path.glob("rewarded-*")]
    parents = {parent for parent, _ in workers}
    assert parents == {found["pid"] for found in pair}
    assert not parents & {worker for _, worker in workers}


# --- killed -----------------------------------------------------------------------------------------------------------

SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
KILLED = {"heads": {"learning_rate": 1e-2}, "policy": {"policy": {}, "baseline": "ema", "kl_coef": 0.1}}
# What one process leaves, but for a generator's state each.
FILES = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"}


@pytest.mark.parametrize(
    ("strategy", "what"), [under(*one.split()) for one in ("ddp heads", "ddp policy", "fsdp2 heads", "zero3 policy")]
)
def test_a_process_that_is_killed_is_recovered_from(strategy, what, processes, tmp_path):
    options = {**SAVED, **KILLED[what]}
    process_runs.together(processes, what, strategy, 2, tmp_path / "whole", options)
    killed = tmp_path / "killed"
    slow = {**options, "seconds_a_step": 0.3}
    running = process_runs.start(processes, what, strategy, 2, killed, slow)
    codes = process_runs.kill_one(running, 1, killed, 2, process_runs.seconds_for(strategy))
    assert codes[1] == -signal.SIGKILL
    assert codes[0], "the other one went on alone, or waits for ever"
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (killed / "run").glob("checkpoint-*"))
    assert 2 <= steps[-1] < 6
    last = killed / "run" / f"checkpoint-{steps[-1]}"
    names = {path.name for path in last.iterdir()}
    assert names >= FILES
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not [name for name in names if name.startswith(("global_step", "pytorch_model", "optimizer_", "zero"))]
    process_runs.together(processes, what, strategy, 2, killed, {**options, "resume": str(last)})
    for rank in range(2):
        expected = adapter(tmp_path / "whole", rank, 2)
        assert_near(expected, adapter(killed, rank, 2), atol=0)
    saved = load_file(killed / "run" / "checkpoint-6" / "model.safetensors")
    assert_near(expected, saved, atol=0)


# --- launched ---------------------------------------------------------------------------------------------------------


def launched(strategy, folder, *words):
    """The numbers of a command that `accelerate launch` started twice."""
    how = ["--config_file", str(process_runs.CONFIGS / f"{strategy}.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", "0"]
    command += ["-m", "hf_adaptive_decode.cli.main", *words, "--json", str(folder / "result.json")]
    environment = {**os.environ, "PYTHONPATH": str(process_runs.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()), done.stdout


def test_the_command_for_policies_is_launched_and_one_process_compares(tmp_path):
    words = "train-policy --steps 2 --prompts-per-step 2 --num-generations 4 --budget 8 --train-problems 16"
    small = "--actions 0 1 --test-problems 4 --validation-problems 4 --eval-samples 2 --save-steps 1"
    found, said = launched("ddp", tmp_path, *words.split(), *small.split())
    assert found["lines"]
    assert said.count("Load it in one line") == 1
    assert AutoDecoForCausalLM.from_pretrained(tmp_path / "adapter").decoding_adapter.has_actions


def test_the_command_for_heads_is_launched_on_a_base_in_parts_and_one_process_goes_on(tmp_path):
    asked = "train-heads --steps 2 --batch-size 4 --train-problems 24 --budget 16 --save-steps 1"
    words = asked.split()
    found, said = launched("fsdp2", tmp_path, *words, "--evaluate")
    assert not found["lines"]
    assert said.count("nothing is compared here") == said.count("examples to train on") == 1
    shutil.rmtree(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "training" / "checkpoint-2")
    before = (tmp_path / "training" / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert load_file(tmp_path / "adapter" / "model.safetensors")
    assert (tmp_path / "training" / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns == before
