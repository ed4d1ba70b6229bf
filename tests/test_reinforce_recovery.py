"""`REINFORCEDecodingTrainer` when it is killed, and when it is two processes: neither may make a difference."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reinforce_runs
import reinforce_tables
import torch
from reinforce_tables import right
from safetensors.torch import load_file

from hf_adaptive_decode import AutoDecoForCausalLM
from hf_adaptive_decode.testbed import load_base_model

# As Adam would blow up the rounding of sums that run in another order.
PLAIN = {"optim": "sgd", "learning_rate": 1.0, "final_learning_rate_ratio": None, "max_steps": 3}
TOKENS, SEQUENCES = {"policy_dropout": 0.0}, {"policy": "sequence_actions", "policy_dropout": 0.0}


@pytest.fixture(scope="module")
def processes():
    return reinforce_runs.context()


# --- killed -----------------------------------------------------------------------------------------------------------


def steps_saved(folder):
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_whole(checkpoint, names):
    """Every file is there, and every file can be read to its end."""
    assert files_of(checkpoint) == names
    AutoDecoForCausalLM.from_pretrained(checkpoint, base_model=load_base_model())
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth", ".bin"):
            torch.load(path, weights_only=False)


def inode(folder, step):
    try:
        return (folder / f"checkpoint-{step}").stat().st_ino
    except FileNotFoundError:
        return None


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = processes.Process(target=reinforce_runs.on_testbed, args=(str(folder), None), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return folder


# When to kill: after so many checkpoints of this attempt, while the next is being written or (`None`) anyhow, and so
# much later at most. `True` goes on from the oldest checkpoint in place of the latest, so that others are replaced.
KILLS = [(1, 0.0, False), (0, 0.01, False), (2, 0.02, True), (1, None, False), (0, 0.02, True), (1, 0.005, False)]


def test_a_run_that_is_killed_again_and_again_ends_with_the_uninterrupted_runs_adapter(
    processes, uninterrupted, tmp_path
):
    rng = random.Random(5)
    names = files_of(uninterrupted / "checkpoint-8")
    killed, while_saving = 0, 0
    for checkpoints, delay, from_oldest in [*KILLS, (None, None, False)]:
        saved = steps_saved(tmp_path)
        begin = 0 if not saved else saved[0] if from_oldest else saved[-1]
        resume = str(tmp_path / f"checkpoint-{begin}") if begin else None
        before = {step: (tmp_path / f"checkpoint-{step}").stat().st_ino for step in saved}
        process = processes.Process(target=reinforce_runs.on_testbed, args=(str(tmp_path), resume), daemon=True)
        process.start()
        # A checkpoint that was there before counts once another folder has its name.
        while checkpoints is not None and process.is_alive():
            new = [step for step in steps_saved(tmp_path) if inode(tmp_path, step) != before.get(step)]
            if len(new) >= checkpoints and (delay is None or (tmp_path / ".saving").exists()):
                time.sleep(rng.random() * (0.05 if delay is None else delay))
                while_saving += (tmp_path / ".saving").exists()
                process.kill()
                killed += 1
                break
            time.sleep(0.0005)
        process.join(120)
        for step in steps_saved(tmp_path):
            assert_whole(tmp_path / f"checkpoint-{step}", names)
    assert process.exitcode == 0
    assert killed == len(KILLS)
    assert while_saving >= 2
    assert steps_saved(tmp_path) == [6, 7, 8]
    assert not (tmp_path / ".saving").exists()
    expected, found = load_file(uninterrupted / "final.safetensors"), load_file(tmp_path / "final.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    ends = [
        json.loads((path / "checkpoint-8" / "trainer_state.json").read_text()) for path in (uninterrupted, tmp_path)
    ]
    rewards = [[entry["reward"] for entry in end["log_history"]] for end in ends]
    assert rewards[0] == rewards[1]


# --- two processes ----------------------------------------------------------------------------------------------------


def adapter(folder, rank, of):
    return load_file(folder / f"adapter-{rank}-of-{of}.safetensors")


def assert_near(one, other):
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6, msg=name)


def timeless(entries):
    """Logged means, without what a clock measured."""
    clock = ("runtime", "per_second", "seconds/", "preparation_time", "flos")
    return [{name: value for name, value in entry.items() if not any(c in name for c in clock)} for entry in entries]


ALL = {"entropy_coef": 0.3, "kl_coef": 0.5, "baseline": "batch", "parallel_budget": [1, 2], "budget": [1, 2]}


@pytest.mark.parametrize(
    "options",
    [
        {"policy": TOKENS, "scenario": "usual"},
        {"policy": SEQUENCES, "scenario": "usual", **ALL},
        {"policy": TOKENS, "scenario": "usual", **ALL, "baseline": "ema", "gradient_accumulation_steps": 2},
        {"policy": TOKENS, "scenario": "idle", "max_steps": 12, "per_device_train_batch_size": 1, "kl_coef": 0.5},
    ],
    ids=["defaults", "all terms", "accumulated", "idle"],
)
def test_two_processes_are_one_with_twice_the_batch(options, processes, tmp_path):
    options = {**PLAIN, "per_device_train_batch_size": 4, "logging_steps": 1, **options}
    size = options["per_device_train_batch_size"]
    (alone,) = reinforce_runs.together(processes, 1, tmp_path, {**options, "per_device_train_batch_size": 2 * size})
    pair = reinforce_runs.together(processes, 2, tmp_path, options)
    # The same prompts at every step, half of them each.
    calls = len(alone["heard"])
    assert [len(found["heard"]) for found in pair] == [calls, calls]
    for whole, one, other in zip(alone["heard"], *(found["heard"] for found in pair), strict=True):
        assert whole[0] == one[0] == other[0]
        assert sorted(one[1] + other[1]) == whole[1]
    assert_near(adapter(tmp_path, 0, 1), adapter(tmp_path, 0, 2))
    assert all(torch.equal(adapter(tmp_path, 0, 2)[n], tensor) for n, tensor in adapter(tmp_path, 1, 2).items())
    # Means are over both.
    for whole, both in zip(timeless(alone["log"]), timeless(pair[0]["log"]), strict=True):
        assert set(whole) == set(both)
        for name, value in whole.items():
            assert both[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_accelerate_launches_two_processes_that_are_one_with_twice_the_batch(processes, tmp_path):
    options = {**PLAIN, "policy": TOKENS, "scenario": "usual", "per_device_train_batch_size": 4, "max_steps": 3}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    here = Path(__file__).parent
    # "multi_gpu" names the launcher; the arguments keep to the CPU, where processes meet by gloo.
    found = subprocess.run(
        [sys.executable, *launch, str(here / "reinforce_launched.py"), str(tmp_path), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    reinforce_runs.together(processes, 1, tmp_path, {**options, "per_device_train_batch_size": 8})
    assert_near(adapter(tmp_path, 0, 1), adapter(tmp_path, 0, 2))


def test_two_processes_without_anything_to_decide_in_one_of_them_do_not_wait_for_each_other(processes, tmp_path):
    options = {**PLAIN, "policy": TOKENS, "scenario": "idle", "max_steps": 12, "per_device_train_batch_size": 1}
    pair = reinforce_runs.together(processes, 2, tmp_path, {**options, "logging_steps": 1})
    kinds = ["steady", "varied", "think"]
    met = {
        tuple(sorted(kinds[found[1][0] % 3] for found in calls))
        for calls in zip(*(one["heard"] for one in pair), strict=True)
    }
    # In one of them nothing is decided, or all is dropped, and the other learns.
    assert {("steady", "think"), ("steady", "varied")} <= met


def test_two_processes_evaluate_every_prompt_once_keep_the_best_and_resume(processes, tmp_path):
    rows = reinforce_runs.SCENARIOS["usual"][0][:7]
    options = {
        "policy": {},
        "scenario": "usual",
        "evaluation": rows,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "baseline": "ema",
    }
    one, other = reinforce_runs.together(processes, 2, tmp_path / "pair", options)
    assert timeless([one["evaluation"]]) == timeless([other["evaluation"]])
    rewards = [entry["eval_reward"] for entry in one["log"] if "eval_reward" in entry]
    assert one["evaluation"]["eval_reward"] == pytest.approx(max(rewards))
    assert (
        one["best"] == other["best"] == str(tmp_path / "pair" / "run" / f"checkpoint-{1 + rewards.index(max(rewards))}")
    )
    best = load_file(f"{one['best']}/model.safetensors")
    for rank in range(2):
        assert all(torch.equal(adapter(tmp_path / "pair", rank, 2)[name], tensor) for name, tensor in best.items())

    # One process finds the same means over the same seven prompts.
    model = AutoDecoForCausalLM.from_pretrained(one["best"], base_model=reinforce_runs.table())
    alone = reinforce_tables.build_trainer(tmp_path / "alone", right, rows, model, evaluation=rows).evaluate()
    for name, value in timeless([one["evaluation"]])[0].items():
        name = name.replace("listening", "right")
        assert name == "epoch" or alone[name] == pytest.approx(value, rel=1e-6), name

    # Dropout is on, and each process draws its own.
    last = load_file(tmp_path / "pair" / "run" / "checkpoint-6" / "model.safetensors")
    middle = str(tmp_path / "pair" / "run" / "checkpoint-3")
    reinforce_runs.together(
        processes, 2, tmp_path / "pair", {**options, "load_best_model_at_end": False, "resume": middle}
    )
    for rank in range(2):
        again = adapter(tmp_path / "pair", rank, 2)
        assert all(torch.equal(again[name], tensor) for name, tensor in last.items())
