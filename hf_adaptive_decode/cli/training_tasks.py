"""Finds the training problems of tasks and data sets, and their one reward; knows nothing of what is done with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..evaluation.sources import TESTBED, Source, prompt_key, rows_in_turns
from ..evaluation.tasks import find_reward, task_source
from .config_file import UsageError
from .tasks import (
    Row,
    add_named_task_arguments,
    check_own,
    dataset_label,
    named_as_flags,
    positive,
    source_of,
    task_parts,
)


def add_training_task_arguments(group: Any) -> None:
    """`--task`, or `--dataset`, `--reward` and what belongs to them: what `training_problems` reads."""
    add_named_task_arguments(group)
    group.add_argument(
        "--problems", type=positive, metavar="N", help="how many; by default all there are, and 4000 of the testbed"
    )


def training_problems(args: argparse.Namespace) -> tuple[str, list[Row], Callable[..., Sequence[float | None]]]:
    """
    The names, the training problems and the reward of `--task` and `--dataset`; the testbed where there is neither.

    Args:
        args (`argparse.Namespace`): With the arguments of `add_training_task_arguments`, and `seed`.

    Raises:
        [`UsageError`]: If a task is a benchmark with nothing to train on, or two have different rewards.
        `ValueError`: If the data cannot be read or lack a column.
        [`MissingExtraError`], [`SandboxUnavailableError`]: If `datasets` or what the reward needs is missing.
    """
    check_own(args)
    sources: list[tuple[str, Source]] = []
    for word in args.task or ([] if args.dataset else [TESTBED]):
        name, path = task_parts(word)
        with named_as_flags(f"--task {word}: "):
            _, source = task_source(name, path)
            sources.append((name, replace(source, chat=True) if args.chat else source))
        if source.benchmark and path is None:
            raise UsageError(
                f"--task {word} is a benchmark, of which nothing is there to train on; name data that have a train "
                f"split as {name}=PATH, or another task."
            )
    with named_as_flags():
        for entry in dict.fromkeys(args.dataset or []):
            sources.append((dataset_label(entry), source_of(entry, args, args.chat, args.prompt_template)))
        rewards = {str(source.reward): name for name, source in sources}
        if len(rewards) > 1:
            raise UsageError(
                f"{' and '.join(rewards.values())} have different rewards, {' and '.join(rewards)}; sample them one by "
                "one and train on both files."
            )
        found: dict[str, Row] = {}
        for row in rows_in_turns([source for _, source in sources], "train", args.problems, args.seed):
            found.setdefault(prompt_key(row["prompt"]), row)  # of two sources that share a problem the first counts
    names = ", ".join(dict.fromkeys(name for name, _ in sources))
    return names, list(found.values()), find_reward(next(iter(rewards)))
