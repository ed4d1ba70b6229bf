"""Trainings in processes of their own, which may be killed or be several; all of it importable by a fresh process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import reinforce_tables
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.utils import logging

from hf_adaptive_decode import AutoDecoConfig, REINFORCEDecodingTrainer
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

_HERE = str(Path(__file__).parent)
TESTBED = {
    "per_device_train_batch_size": 4,
    "budget": 12,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "baseline": "ema",
    "kl_coef": 0.1,
}


def context(*preload: str):
    """
    Processes that begin with everything imported, and otherwise as fresh as from a shell.

    The imports take seconds, and here a server makes them once: every process is a copy of it, made before any model
    was built or any thread was started.
    """
    before = os.environ.get("PYTHONPATH", "")
    # A server that imports in vain says nothing, and every process would import by itself.
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, str(Path(_HERE).parent), before])
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["reinforce_runs", *preload])
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return found


def _quietly():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Slow(TrainerCallback):
    """Takes its time for each step, so that a process can be killed in the middle of a run."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def on_step_begin(self, *args, **kwargs):
        time.sleep(self._seconds)


def on_testbed(folder: str, resume: str | None) -> None:
    """Trains on the testbed, and leaves the adapter of the end in `final.safetensors`."""
    _quietly()
    torch.manual_seed(0)

    def busy(completion_ids, **columns):
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    actions = [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.3}]
    trainer = REINFORCEDecodingTrainer(
        load_base_model(),
        [testbed_reward, busy],
        reinforce_tables.arguments(folder, **TESTBED),
        build_problems("train", 24),
        processing_class=load_tokenizer(),
        decoding_config=AutoDecoConfig(policy="token_actions", actions=actions, max_token_budget=16),
    )
    trainer.train(resume_from_checkpoint=resume)
    save_file(reinforce_tables.adapter_of(trainer), Path(folder, "final.safetensors"))


def on_table(rank: int, port: int, processes: int, folder: str, options: dict) -> None:
    """
    Trains on the table, as one process of several, and writes down what came of it.

    `options` are those of `reinforce_tables.train`, with `policy` for the adapter's settings and `scenario` for the
    rows and rewards.
    """
    _quietly()
    if processes > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank}
        where |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in where.items()}
    options, heard = dict(options), []
    resume, settings = options.pop("resume", None), options.pop("policy")
    rows, reward = SCENARIOS[options.pop("scenario")]

    def listening(number, trainer_state, **given):
        heard.append([trainer_state.global_step, sorted(set(number))])
        return reward(**given)

    trainer = reinforce_tables.build_trainer(
        Path(folder, "run"), listening, rows, table(), reinforce_tables.config(**settings), **options
    )
    trainer.train(resume_from_checkpoint=resume)
    trained = list(heard)
    found = {"heard": trained, "log": trainer.state.log_history, "best": trainer.state.best_model_checkpoint}
    if options.get("evaluation"):
        found["evaluation"] = trainer.evaluate()
    save_file(reinforce_tables.adapter_of(trainer), Path(folder, f"adapter-{rank}-of-{processes}.safetensors"))
    Path(folder, f"found-{rank}-of-{processes}.json").write_text(json.dumps(found))
    if processes > 1:
        torch.distributed.destroy_process_group()


def table():
    """After "think" the answer is certain, so that nothing is decided there."""
    return reinforce_tables.build_table(think={"a": 1.0})


def _numbered(*kinds):
    return [{"prompt": kinds[index % len(kinds)], "number": index} for index in range(24)]


def _nothing_to_learn_after_varied(prompts, completions, **columns):
    taught = reinforce_tables.right(prompts, completions)
    return [0.5 if prompt == "varied" else value for prompt, value in zip(prompts, taught, strict=True)]


SCENARIOS = {
    "usual": (_numbered("steady", "varied"), reinforce_tables.right),
    # A third of the prompts brings no decisions, and a third groups that are all dropped.
    "idle": (_numbered("steady", "varied", "think"), _nothing_to_learn_after_varied),
}


def together(found, processes: int, folder: Path, options: dict, seconds: float = 60) -> list[dict]:
    """Runs `on_table` in so many processes at once, and gives what each wrote down."""
    folder.mkdir(exist_ok=True)
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    running = [
        found.Process(target=on_table, args=(rank, port, processes, str(folder), options), daemon=True)
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert codes == [0] * processes, f"exit codes {codes}; None is a process that did not end"
    return [json.loads(Path(folder, f"found-{r}-of-{processes}.json").read_text()) for r in range(processes)]
