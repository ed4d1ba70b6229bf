"""Trainings in several processes that are set up as `accelerate launch` sets them up, with the configs of the examples.

Run as a script, it is one of the processes that `accelerate launch` starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import reinforce_runs
import reinforce_tables
import test_training
import tiny
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import save_file

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, AutoDecoTrainer

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "accelerate"


def launch_environment(strategy: str, processes: int, port: int) -> dict[str, str]:
    """What `accelerate launch` would set for each process, beside the numbers of the processes."""
    words = ["--config_file", str(CONFIGS / f"{strategy}.yaml"), "--num_processes", str(processes)]
    made: dict[str, str] = {}
    with mock.patch("torch.distributed.run.run", side_effect=lambda args: made.update(os.environ)):
        launch_command(launch_command_parser().parse_args([*words, "--main_process_port", str(port), "training.py"]))
    return {name: value for name, value in made.items() if os.environ.get(name) != value and name != "PYTHONPATH"}


def on_heads(rank: int, processes: int, folder: str, options: dict) -> None:
    """Trains heads, and writes down what came of it."""
    options = dict(options)
    rows, resume = options.pop("rows", 32), options.pop("resume", None)
    evaluation, slow = options.pop("evaluation", 0), options.pop("seconds_a_step", 0.0)
    data, every = test_training.build_rows(rows), options.pop("commands_every", None)
    if every is not None:
        told = {"low_prompt": "w1 w2", "high_prompt": "w3 w4 w5"}
        data = [{**row, **{n: None if i % every else text for n, text in told.items()}} for i, row in enumerate(data)]
    torch.manual_seed(0)
    base = tiny.build_base(options.pop("family", "qwen3"))
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(**options.pop("policy", {})))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if "decoding_adapters" not in name}
    trainer = AutoDecoTrainer(
        model,
        test_training.arguments(Path(folder, "run"), **options),
        train_dataset=data,
        eval_dataset=test_training.build_rows(evaluation, seed=1) if evaluation else None,
        processing_class=test_training.build_tokenizer(),
        callbacks=[reinforce_runs.Slow(slow)] if slow else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    found = {"log": trainer.state.log_history, "best": trainer.state.best_model_checkpoint}
    if evaluation:
        found["evaluation"] = trainer.evaluate()
    trainer.save_model(str(Path(folder, "saved")))
    found |= _held(base)
    whole = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    if all(type(tensor) is torch.Tensor and tensor.shape == before[name].shape for name, tensor in whole.items()):
        found["base_moved"] = [name for name, tensor in whole.items() if not torch.equal(tensor, before[name])]
    _write(found, test_training.adapter_of(model), rank, processes, folder)


def on_policy(rank: int, processes: int, folder: str, options: dict) -> None:
    """Trains an action policy on the table, and writes down what came of it."""
    options, heard = dict(options), []
    resume, settings = options.pop("resume", None), options.pop("policy")
    slow = options.pop("seconds_a_step", 0.0)
    rows, reward = reinforce_runs.SCENARIOS[options.pop("scenario", "usual")]
    rows = rows[: options.pop("rows", len(rows))]

    def listening(number, trainer_state, **given):
        heard.append([trainer_state and trainer_state.global_step, sorted(set(number))])
        Path(folder, f"rewarded-{os.getppid()}-{os.getpid()}").touch()
        return reward(**given)

    helpers = {"callbacks": [reinforce_runs.Slow(slow)]} if slow else None
    trainer = reinforce_tables.build_trainer(
        Path(folder, "run"),
        listening,
        rows,
        reinforce_runs.table(),
        reinforce_tables.config(**settings),
        helpers=helpers,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    found = {"heard": heard, "log": trainer.state.log_history, "best": trainer.state.best_model_checkpoint}
    found |= {
        "pid": os.getpid(),
        "prompts": len(trainer.train_dataset),
        **_held(trainer.accelerator.unwrap_model(trainer.model)),
    }
    trainer.save_model(str(Path(folder, "saved")))
    _write(found, reinforce_tables.adapter_of(trainer), rank, processes, folder)


TARGETS = {"heads": on_heads, "policy": on_policy}


def _part_small_ones_too() -> None:
    """DeepSpeed leaves whole what has less than 100,000 numbers, which here is everything."""
    import deepspeed

    initialize = deepspeed.initialize

    def parting_all(config, **how):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(config=config, **how)

    deepspeed.initialize = parting_all


def _held(model) -> dict:
    """How many numbers this process has of the base, and of the adapter."""
    held = {"base": 0, "adapter": 0}
    for name, parameter in model.named_parameters():
        part = getattr(parameter, "ds_tensor", parameter)
        part = part.to_local() if hasattr(part, "to_local") else part
        held["adapter" if "decoding_adapters" in name else "base"] += part.numel()
    return {f"held_{name}": count for name, count in held.items()}


def _write(found: dict, adapter: dict, rank: int, processes: int, folder: str) -> None:
    save_file(adapter, Path(folder, f"adapter-{rank}-of-{processes}.safetensors"))
    Path(folder, f"found-{rank}-of-{processes}.json").write_text(json.dumps(found))


def one_process(what: str, strategy: str, rank: int, port: int, processes: int, folder: str, options: dict) -> None:
    """One of several processes, or the only one."""
    reinforce_runs._quietly()
    errors = os.open(Path(folder, f"err-{rank}-of-{processes}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, sys.stderr.fileno())
    if processes > 1:
        os.environ |= launch_environment(strategy, processes, port)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank}
        where |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in where.items()}
    if processes > 1 and strategy == "zero3":
        _part_small_ones_too()
    TARGETS[what](rank, processes, folder, options)
    if processes > 1:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(found, what: str, strategy: str, processes: int, folder: Path, options: dict) -> list:
    folder.mkdir(exist_ok=True)
    port = free_port()
    running = [
        found.Process(target=one_process, args=(what, strategy, rank, port, processes, str(folder), options))
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    return running


def seconds_for(strategy: str) -> int:
    """How long a training may take: on a processor DeepSpeed compiles something the first time."""
    return 300 if strategy.startswith("zero") else 90


def kill_one(running: list, which: int, folder: Path, checkpoint: int, seconds: int) -> list[int | None]:
    """Kills one of the processes as soon as there is a checkpoint, and gives how all of them ended."""
    deadline = time.monotonic() + seconds
    while not (folder / "run" / f"checkpoint-{checkpoint}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running[which].kill()
    for process in running:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


def together(found, what: str, strategy: str, processes: int, folder: Path, options: dict) -> list[dict]:
    """Runs a training in so many processes at once, and gives what each wrote down."""
    seconds = seconds_for(strategy)
    running = start(found, what, strategy, processes, folder, options)
    for process in running:
        process.join(seconds)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    said = [Path(folder, f"err-{rank}-of-{processes}").read_text()[-3000:] for rank in range(processes)]
    assert codes == [0] * processes, "\n".join([f"exit codes {codes}; None did not end", *said])
    return [json.loads(Path(folder, f"found-{r}-of-{processes}.json").read_text()) for r in range(processes)]


if __name__ == "__main__":
    TARGETS[sys.argv[1]](int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[2], json.loads(sys.argv[3]))
