"""Finds the model, the problems and the reward that flags ask for; knows nothing of what a command does with them."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AdaptiveDecodeError, MissingExtraError
from ..evaluation.sources import REWARDS, TESTBED, Source, rows_in_turns
from ..evaluation.tasks import PRESETS, Task, find_reward, load_task

__all__ = [
    "TESTBED",
    "above_zero",
    "add_eval_task_arguments",
    "add_model_arguments",
    "add_named_task_arguments",
    "add_prompt_arguments",
    "add_task_arguments",
    "asked",
    "check_chat",
    "check_own",
    "count",
    "dataset_label",
    "dataset_names",
    "load_model",
    "load_problems",
    "load_tasks",
    "named_as_flags",
    "positive",
    "read_source",
    "reward_function",
    "source_of",
    "task_parts",
    "tasks_of",
]
_PROMPT_COLUMN = "prompt"
# Of `function` the columns are HumanEval's: `--task humaneval=PATH` is for such data.
_OFFERED = [name for name in REWARDS if name != "function"]
# What the library calls an argument, with or without its value: `dataset=rows.jsonl`, `prompt_column=`.
_ARGUMENT = re.compile(r"`(\w+)=([^`]*)`")

Row = dict[str, Any]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--dataset`, `--reward` and what belongs to them."""
    add_model_arguments(parser)
    _add_dataset_arguments(parser, default=[TESTBED])


def add_prompt_arguments(group: Any) -> None:
    """`--prompt-template` and `--chat`: how problems are put to the model."""
    group.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="how the problems of --dataset are asked, with {prompt} where their text goes and {tests} where tests do",
    )
    group.add_argument(
        "--chat", action="store_true", help="ask plain prompts as a user's message, through the model's chat template"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--threads`, which `load_model` reads."""
    parser.add_argument("--model", default=TESTBED, help="folder or Hub id of a model; by default the embedded one")
    parser.add_argument("--threads", type=positive, help="CPU threads; by default what torch chooses")


def add_eval_task_arguments(parser: argparse.ArgumentParser) -> None:
    """`--task`, or `--dataset`, `--reward` and what belongs to them, and how many problems: what `load_tasks` reads."""
    group = parser.add_argument_group("tasks")
    add_named_task_arguments(group)
    for part, most, what in (("validation", 300, "to choose baselines on"), ("test", 600, "to report on")):
        group.add_argument(
            f"--{part}-problems", type=positive, default=most, metavar="N", help=f"at most how many of a task {what}"
        )
    group.add_argument("--seed", type=int, default=0, help="seeds the choice of problems")


def add_named_task_arguments(group: Any) -> None:
    """`--task`, or `--dataset`, `--reward` and what belongs to them."""
    group.add_argument(
        "--task",
        nargs="+",
        action="extend",
        metavar="NAME[=PATH]",
        help="one or several of: testbed (the default), testbed:TYPE (calc, run, coin, sign, or some joined with +), "
        f"{', '.join(PRESETS)}. PATH is a file, folder or Hub id in the same format, in place of the data "
        "set that the name stands for",
    )
    _add_dataset_arguments(group, default=None)
    add_prompt_arguments(group)


def _add_dataset_arguments(parser: Any, default: list[str] | None) -> None:
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=default,
        help="problems, of one or several sources: `testbed`"
        + (", " if default is None else " (the default), ")
        + "a .jsonl, .json or .parquet file, or a folder or Hub id for `datasets`, as NAME, NAME:SPLIT or "
        "NAME:CONFIG:SPLIT. A file, a single split and a named SPLIT are divided into train, validation and test "
        "(80/10/10) by a hash of the prompt; else the set's own splits are used, and those it lacks are taken from its "
        "train split in the same way",
    )
    parser.add_argument("--prompt-column", default=_PROMPT_COLUMN, metavar="NAME", help="the column with the prompts")
    parser.add_argument(
        "--solution-column",
        metavar="NAME",
        help="the column that the reward scores by; `solution` by default, and `tests` for the reward `code`",
    )
    parser.add_argument(
        "--solution-after",
        metavar="TEXT",
        help="the solution is what follows the last TEXT in its column (GSM8K: ####)",
    )
    parser.add_argument("--reward", default=TESTBED, choices=_OFFERED, help="how completions are scored")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return number


def count(text: str) -> int:
    """A whole number from 0, for argparse."""
    return 0 if text == "0" else positive(text)


def above_zero(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a command was asked for, for its result."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "json", "config")}


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """
    The model in evaluation mode, on the accelerator if it is not the embedded one, and its tokenizer.

    Raises:
        `ValueError`: If it cannot be loaded. Code that comes with a model is never run.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..testbed import load_base_model, load_tokenizer

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.model == TESTBED:
        return load_base_model(), load_tokenizer()
    try:
        # Said aloud: left out, transformers may ask at the terminal.
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except AdaptiveDecodeError:
        raise
    except Exception as error:  # damaged files raise whatever their reader raises
        raise ValueError(
            f"--model {args.model} cannot be loaded: {error} It has to be `testbed`, or a folder or Hub id with a "
            "causal model and its tokenizer."
        ) from error
    # The embedded model, in contrast, is too small to gain from one.
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def reward_function(name: str) -> Callable[..., Sequence[float | None]]:
    """The reward of a name; see [`~evaluation.tasks.find_reward`]."""
    return find_reward(name)


def check_chat(args: argparse.Namespace, tokenizer: Any) -> None:
    """
    Refuses `--chat` for a model that knows no conversations.

    Raises:
        `ValueError`: If its tokenizer has no chat template.
    """
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat needs a chat template, and the tokenizer of {args.model} has none; leave it out.")


def load_problems(args: argparse.Namespace, split: str, n: int | None, seed: int, chat: bool = False) -> list[Row]:
    """
    Rows of all of `--dataset`, the sources taking turns, so that every prefix of n rows is balanced.

    Args:
        args (`argparse.Namespace`): With the task arguments, and `prompt_template` if the command has it.
        split (`str`): `"train"`, `"validation"` or `"test"`; no prompt is in two of them.
        n (`int`, *optional*): How many rows in all; all there are when `None` (of the testbed, as many as it gives).
        seed (`int`): Which ones.
        chat (`bool`): Whether plain prompts are asked as a user's message.

    Raises:
        `ValueError`: If a source cannot be read, lacks a column or the rows, or does not fit the reward.
        [`MissingExtraError`]: If `datasets` is needed and not installed.
    """
    with named_as_flags():
        template = vars(args).get("prompt_template")
        sources = [source_of(entry, args, chat, template) for entry in dict.fromkeys(args.dataset)]
        return rows_in_turns(sources, split, n, seed)


def load_tasks(args: argparse.Namespace) -> list[Task]:
    """
    The tasks of `--task` and one for each of `--dataset`; the testbed where there is neither.

    Those that would have the same name are called what the flags say instead.

    Args:
        args (`argparse.Namespace`): With the arguments of `add_eval_task_arguments`.

    Raises:
        `ValueError`: If there is no such task, or its data cannot be read, lack a column or leave a part empty.
        [`MissingExtraError`], [`SandboxUnavailableError`]: If `datasets` or what a reward needs is missing.
    """
    check_own(args)
    return tasks_of(args, args.task or ([] if args.dataset else [TESTBED]), args.dataset or [], args.prompt_template)


def dataset_names(args: argparse.Namespace) -> str:
    """What `--dataset` is called where others read it, without the folders that files lie in."""
    return ", ".join(map(dataset_label, dict.fromkeys(args.dataset)))


def dataset_label(entry: str) -> str:
    """What one of `--dataset` is called, without the folders that a file lies in."""
    return Path(entry).stem if Path(entry).exists() else entry


def tasks_of(
    args: argparse.Namespace, names: Sequence[str], datasets: Sequence[str], template: str | None = None
) -> list[Task]:
    """
    The tasks of some names, and one for each of some data sets.

    Args:
        args (`argparse.Namespace`): With how to read the data sets, and how many problems.
        names (sequence of `str`): As `--task` takes them.
        datasets (sequence of `str`): As `--dataset` takes them.
        template (`str`, *optional*): How the problems of the data sets are asked.
    """
    how: dict[str, Any] = {"validation": args.validation_problems, "test": args.test_problems, "seed": args.seed}
    found: dict[str, Task] = {}
    for word in names:
        name, path = task_parts(word)
        with named_as_flags(f"--task {word}: "):
            found[word] = load_task(name, path, chat=args.chat, **how)
    for entry in datasets:
        with named_as_flags():
            source = source_of(entry, args, args.chat, template)
            found[entry] = load_task(*([source] if source.dataset == entry else [Path(entry).stem, source]), **how)
    shared = Counter(task.name for task in found.values())
    return [replace(task, name=word) if shared[task.name] > 1 else task for word, task in found.items()]


def task_parts(word: str) -> tuple[str, str | None]:
    """Name and path of NAME or NAME=PATH."""
    name, equals, path = word.partition("=")
    if equals and not path:
        raise ValueError(f"--task {word} has no path behind its =; write {word}PATH, or {name} alone.")
    return name, path or None


def check_own(args: argparse.Namespace) -> None:
    """Refuses flags that would be without effect."""
    given = {
        "--reward": args.reward != TESTBED,
        "--prompt-column": args.prompt_column != _PROMPT_COLUMN,
        "--solution-column": args.solution_column,
        "--solution-after": args.solution_after,
        "--prompt-template": args.prompt_template,
    }
    idle = [flag for flag, is_given in given.items() if is_given]
    if idle and not args.dataset:
        raise ValueError(
            f"{idle[0]} is for --dataset, and none is given: pass --dataset with --reward and the columns for data of "
            "your own, in place of --task or beside it."
        )


def source_of(entry: str, args: argparse.Namespace, chat: bool, template: str | None = None) -> Source:
    """One of `--dataset` with what the other flags say of it."""
    columns = (args.prompt_column, args.solution_column, args.solution_after)
    return Source(read_source(entry), args.reward, *columns, prompt_template=template, chat=chat)


def read_source(entry: str) -> Any:
    """A Parquet file as the rows in it; all else as it is, to be read by the library."""
    if Path(entry).suffix != ".parquet":
        return entry
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    try:
        return datasets.Dataset.from_parquet(entry)
    except Exception as error:  # damaged files raise whatever their reader raises
        raise ValueError(f"`dataset={entry}` cannot be loaded: {type(error).__name__}: {error}") from error


@contextmanager
def named_as_flags(where: str = "") -> Iterator[None]:
    """Errors of the library with its arguments as the flags that they come from, behind `where`."""
    try:
        yield
    except ValueError as error:
        said = _ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')} {found[2]}".rstrip(), str(error))
        raise ValueError(where + said) from error
