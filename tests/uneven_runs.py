"""Trainings in several processes that do not get the same: rewards for some prompts alone, a short last batch."""

from __future__ import annotations

import os
from pathlib import Path

import reinforce_runs
import reinforce_tables
import tiny

from hf_adaptive_decode import AutoDecoTrainer, AutoDecoTrainingArguments
from hf_adaptive_decode.errors import AdaptiveDecodeError


def _paired(prompts, completions):
    return reinforce_tables.right(prompts, completions)


def _some_alone(prompts, completions, **columns):
    """`None` for every third prompt by number, which two processes do not get in equal numbers."""
    numbers = columns["row"]
    found = _paired(prompts, completions)
    return [None if number % 3 == 0 else value for number, value in zip(numbers, found, strict=True)]


def _fails_in_one(prompts, completions, **columns):
    if os.environ.get("RANK") == "1" and columns["trainer_state"].global_step == 1:
        raise ValueError("this process has had enough")
    return _paired(prompts, completions)


def _rows(count):
    return [{"prompt": ("steady", "varied")[index % 2], "number": index, "row": index} for index in range(count)]


reinforce_runs.SCENARIOS |= {
    "some alone": (_rows(24), _some_alone),
    "short": (_rows(7), reinforce_tables.right),
}


def on_table(*args) -> None:
    """As `reinforce_runs.on_table`, with the scenarios from here."""
    reinforce_runs.on_table(*args)


def _join(rank: int, port: int, processes: int) -> None:
    reinforce_runs._quietly()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank}
    where |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in where.items()}


def failing(rank: int, port: int, processes: int, folder: str, options: dict) -> None:
    """A training whose reward fails in one of the processes."""
    _join(rank, port, processes)
    reinforce_tables.build_trainer(folder, _fails_in_one, _rows(32), reinforce_runs.table(), **options).train()


def with_a_cache(rank: int, port: int, processes: int, folder: str) -> None:
    """A training of heads in several processes that is to keep what it computes of the base."""
    _join(rank, port, processes)
    args = AutoDecoTrainingArguments(output_dir=folder, use_cpu=True, report_to="none", epoch_cache="hidden")
    try:
        AutoDecoTrainer(tiny.build_base(), args, train_dataset=[], processing_class=reinforce_tables.build_tokenizer())
    except AdaptiveDecodeError as error:
        Path(folder, f"said-{rank}").write_text(str(error))
