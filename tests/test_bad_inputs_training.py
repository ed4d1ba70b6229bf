"""Training when the disk is full, data teach nothing, rewards hang, and processes do not get the same."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import time

import pytest
import reinforce_runs
import reinforce_tables
import torch
import uneven_runs
from full_disks import can_mount, in_a_child, mount_small, no_file_beyond
from reinforce_tables import build_trainer, logged, right
from safetensors.torch import load_file
from test_training import adapter_of, arguments, build_rows, build_tokenizer, train
from tiny import build_base
from transformers import TrainerCallback

from hf_adaptive_decode import AutoDecoForCausalLM, AutoDecoTrainer
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.errors import AdaptiveDecodeError

# --- disks without room -----------------------------------------------------------------------------------------------


class FillsUp(TrainerCallback):
    """From its first checkpoint on no file may grow beyond a size."""

    def __init__(self, size: int):
        self.size, self.limit = size, None

    def on_save(self, *args, **kwargs):
        if self.limit is None:
            self.limit = no_file_beyond(self.size)
            self.limit.__enter__()

    def empty(self):
        self.limit.__exit__(None, None, None)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SIZES = {"model.safetensors": 20_000, "optimizer.pt": 120_000}


@pytest.mark.parametrize("file", SIZES)
def test_a_checkpoint_without_room_keeps_the_one_before_and_training_goes_on_from_there(tmp_path, file):
    whole, _ = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / file).stat().st_size > SIZES[file]
    torch.manual_seed(0)
    folder, disk = tmp_path / "run", FillsUp(SIZES[file])
    trainer = AutoDecoTrainer(
        AutoDecoForCausalLM.from_base(build_base("qwen3")),
        arguments(folder),
        train_dataset=build_rows(),
        processing_class=build_tokenizer(),
        callbacks=[disk],
    )
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*resume, make room; .*checkpoint-2"):
            trainer.train()
    finally:
        disk.empty()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2"]  # the part of another takes no room
    kept, expected = files_of(folder / "checkpoint-2"), files_of(checkpoint)
    assert kept["model.safetensors"] == expected["model.safetensors"]
    assert set(kept) == set(expected)
    resumed, _ = train(folder, resume=True)
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], tensor), name


def test_the_first_checkpoint_without_room_says_so(tmp_path):
    with no_file_beyond(20_000), pytest.raises(OSError, match=r"checkpoint-2 could not be written") as caught:
        train(tmp_path)
    assert "there is none" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full_keeps_the_last_whole_checkpoint(tmp_path):
    """With rewards: what that trainer keeps beside the adapter has to find its place, too."""
    if not can_mount(tmp_path):
        pytest.skip("no file system can be mounted here")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "baseline": "ema", "kl_coef": 0.5}

    def run(folder, resume=None):
        trainer = build_trainer(folder, **options)
        trainer.train(resume_from_checkpoint=resume)
        return reinforce_tables.adapter_of(trainer)

    def job():
        whole = run(tmp_path / "whole")
        one = sum(len(data) for data in files_of(tmp_path / "whole" / "checkpoint-1").values())
        disk = tmp_path / "disk"
        disk.mkdir()
        mount_small(disk, 3 * one)  # room for two checkpoints and for what a file system needs itself
        with pytest.raises(OSError, match="could not be written"):
            run(disk / "run")
        kept = sorted(path.name for path in (disk / "run").iterdir())
        assert 0 < len(kept) < 6
        assert all(name.startswith("checkpoint-") for name in kept)
        shutil.copytree(disk / "run", tmp_path / "moved")
        found = run(tmp_path / "moved", resume=True)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())

    assert in_a_child(job) == 0


def test_a_command_on_a_full_disk_ends_with_one_line(tmp_path, capsys):
    words = ["train-heads", "--output", str(tmp_path / "out"), "--train-problems", "8", "--steps", "1"]
    with no_file_beyond(20_000):
        assert main(words) == 1
    said = capsys.readouterr().err
    assert said.count("hf-adaptive-decode train-heads: error: ") == 1
    assert "checkpoint-1 could not be written: model.safetensors could not be written" in said
    assert "Traceback" not in said
    assert main(words) == 0
    AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


# --- data that teach nothing ------------------------------------------------------------------------------------------


def hidden(rows):
    """Tokenised examples of which nothing is to be learned."""
    ids = [[3 + (7 * row + place) % 70 for place in range(6)] for row in range(rows)]
    return [{"input_ids": one, "labels": [-100] * 6} for one in ids]


def taught(rows):
    return [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in hidden(rows)]


@pytest.mark.parametrize("loss", ["end_to_end", "two_loss"])
def test_batches_without_a_target_leave_the_adapter_and_the_others_alone(tmp_path, loss):
    """Half of the batches have nothing to learn; the loss stays a number, and so do the weights."""
    settings = {"loss_type": loss, "per_device_train_batch_size": 4, "max_steps": 8, "save_strategy": "no"}
    model, trainer = train(tmp_path, rows=hidden(16) + taught(16), **settings)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(math.isfinite(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry)
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(model).values())


@pytest.mark.parametrize(
    ("rows", "named"), [([], "empty"), ([{"question": "w1", "answer": "w2"}], "question.*answer|answer.*question")]
)
@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_a_data_set_that_cannot_be_used_is_refused_by_either_trainer(tmp_path, rows, named, where):
    data = {"train_dataset": build_rows(4), where: rows}
    with pytest.raises((AdaptiveDecodeError, ValueError), match=named):
        AutoDecoTrainer(
            AutoDecoForCausalLM.from_base(build_base("qwen3")),
            arguments(tmp_path),
            processing_class=build_tokenizer(),
            **data,
        )
    with pytest.raises((AdaptiveDecodeError, ValueError), match=named):
        build_trainer(tmp_path, rows=rows if where == "train_dataset" else None, evaluation=data.get("eval_dataset"))


def test_a_reward_without_its_column_lists_those_there_are(tmp_path):
    def reward(completions, solution):
        return [1.0] * len(completions)

    with pytest.raises((AdaptiveDecodeError, ValueError), match=r"(?s)solution.*wants_a"):
        build_trainer(tmp_path, reward).train()


# --- rewards that hang ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="deadlines need fork")
def test_training_goes_on_without_the_prompts_whose_reward_hangs(tmp_path):
    rows = [{"prompt": ("steady", "varied")[index % 2], "number": index} for index in range(16)]

    def reward(prompts, completions, number, **columns):
        if 11 in number:
            time.sleep(60)
        return right(prompts, completions)

    begin = time.monotonic()
    how = {"reward_timeout": 0.3, "reward_errors": "skip", "max_steps": 2}
    trainer = build_trainer(tmp_path, reward, rows, **how)
    trainer.train()
    assert time.monotonic() - begin < 20
    assert sorted(logged(trainer, "rewards/skipped")) == [0.0, 4.0]


# --- processes that do not get the same -------------------------------------------------------------------------------

PLAIN = {"optim": "sgd", "learning_rate": 1.0, "final_learning_rate_ratio": None, "max_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def processes():
    return reinforce_runs.context()


def together(found, count, folder, options, monkeypatch):
    monkeypatch.setattr(reinforce_runs, "on_table", uneven_runs.on_table)
    return reinforce_runs.together(found, count, folder, options)


def adapter(folder, rank, of):
    return load_file(folder / f"adapter-{rank}-of-{of}.safetensors")


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch"])
def test_processes_with_unequal_numbers_of_rewards_are_one_with_all_of_them(processes, tmp_path, monkeypatch, baseline):
    options = {**PLAIN, "policy": {"policy_dropout": 0.0}, "scenario": "some alone", "baseline": baseline}
    whole = {**options, "per_device_train_batch_size": 8}
    (alone,) = together(processes, 1, tmp_path, whole, monkeypatch)
    pair = together(processes, 2, tmp_path, {**options, "per_device_train_batch_size": 4}, monkeypatch)
    shares = [[sum(number % 3 > 0 for number in numbers) for _, numbers in one["heard"]] for one in pair]
    assert any(one != other for one, other in zip(*shares, strict=True))
    for name, tensor in adapter(tmp_path, 0, 1).items():
        for rank in range(2):
            torch.testing.assert_close(adapter(tmp_path, rank, 2)[name], tensor, rtol=0, atol=1e-6)
    rewards = [[entry["reward"] for entry in one["log"] if "reward" in entry] for one in (alone, pair[0])]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-6)


def test_a_last_batch_that_is_short_holds_nobody_up(processes, tmp_path, monkeypatch):
    options = {**PLAIN, "policy": {"policy_dropout": 0.0}, "scenario": "short", "per_device_train_batch_size": 2}
    pair = together(processes, 2, tmp_path, {**options, "max_steps": 5}, monkeypatch)
    assert [len(one["heard"]) for one in pair] == [5, 5]
    for name, tensor in adapter(tmp_path, 0, 2).items():
        assert torch.equal(adapter(tmp_path, 1, 2)[name], tensor)
    assert json.loads((tmp_path / "found-0-of-2.json").read_text())["log"]


def exit_codes(found, target, *arguments):
    """How two processes ended that run `target` together."""
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    running = [found.Process(target=target, args=(rank, port, 2, *arguments), daemon=True) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


def test_a_reward_that_fails_in_one_process_ends_the_other_too(processes, tmp_path):
    codes = exit_codes(processes, uneven_runs.failing, str(tmp_path), {"max_steps": 4})
    assert None not in codes
    assert all(codes)


def test_an_epoch_cache_is_one_processs_and_several_are_told(processes, tmp_path):
    assert exit_codes(processes, uneven_runs.with_a_cache, str(tmp_path)) == [0, 0]
    for rank in range(2):
        assert "there are 2 processes" in (tmp_path / f"said-{rank}").read_text()
