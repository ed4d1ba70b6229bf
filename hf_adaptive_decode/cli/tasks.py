"""Finds the model, the problems and the reward that a command is asked for; knows nothing of what it does with them."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdaptiveDecodeError, MissingExtraError

TESTBED = "testbed"
SPLITS = ("train", "validation", "test")
# The column that each reward scores by, in its own word for it; the testbed's reads the prompt.
REWARDS: dict[str, str | None] = {TESTBED: None, "exact_match": "solution", "math": "solution", "code": "tests"}
_TEST_PERCENT, _VALIDATION_PERCENT = 10, 10

Row = dict[str, Any]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--dataset`, `--reward` and what belongs to them."""
    parser.add_argument("--model", default=TESTBED, help="folder or Hub id of a model; by default the embedded one")
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[TESTBED],
        help="problems, of one or several sources: `testbed` (the default), a .jsonl or .json file, or a folder or Hub "
        "id for `datasets`, as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. A file, a single split and a named SPLIT are "
        "divided into train, validation and test (80/10/10) by a hash of the prompt; else the set's own splits are "
        "used, and those it lacks are taken from its train split in the same way",
    )
    parser.add_argument("--prompt-column", default="prompt", metavar="NAME", help="the column with the prompts")
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
    parser.add_argument("--reward", default=TESTBED, choices=list(REWARDS), help="how completions are scored")
    parser.add_argument("--threads", type=positive, help="CPU threads; by default what torch chooses")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return number


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
    """
    The reward of a name.

    Raises:
        [`MissingExtraError`], [`SandboxUnavailableError`]: If it cannot work here.
    """
    from .. import rewards
    from ..testbed import testbed_reward

    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose one of {', '.join(REWARDS)}.")
    if name == TESTBED:
        return testbed_reward
    reward: Callable[..., Sequence[float | None]] = getattr(rewards, f"{name}_reward")
    # Scoring nothing finds out now, instead of after the first hour of completions, what is missing.
    reward(completions=[], **{str(REWARDS[name]): []})
    return reward


def load_problems(args: argparse.Namespace, split: str, n: int | None, seed: int) -> list[Row]:
    """
    Rows of all of `--dataset`, the sources taking turns, so that every prefix of n rows is balanced.

    Args:
        args (`argparse.Namespace`): With the task arguments.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        n (`int`, *optional*): How many rows in all; all there are when `None`.
        seed (`int`): Which ones.
    """
    entries = list(dict.fromkeys(args.dataset))
    counts = [None if n is None else len(range(turn, n, len(entries))) for turn in range(len(entries))]
    sources = [load_rows(one, args, split, count, seed) for one, count in zip(entries, counts, strict=True)]
    longest = max(map(len, sources))
    return [rows[turn] for turn in range(longest) for rows in sources if turn < len(rows)]


def load_rows(entry: str, args: argparse.Namespace, split: str, n: int | None, seed: int) -> list[Row]:
    """
    Rows of one source, with a `prompt` and the reward's columns: `solution`, or `tests` and `entry_point`.

    Which rows, and their order, depends on the seed and the prompts alone; fewer rows are the first of more.

    Args:
        entry (`str`): One of `--dataset`.
        args (`argparse.Namespace`): With the task arguments.
        split (`str`): `"train"`, `"validation"` or `"test"`; no prompt is in two of them.
        n (`int`, *optional*): How many rows; all there are when `None` (of the testbed, as many as it gives).
        seed (`int`): Which ones.

    Raises:
        `ValueError`: If the source cannot be read, lacks a column or the rows, or does not fit the reward.
        [`MissingExtraError`]: If `datasets` is needed and not installed.
    """
    from ..testbed import build_problems

    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if (entry == TESTBED) != (args.reward == TESTBED):
        raise ValueError(
            f"--reward {args.reward} does not fit --dataset {entry}: the reward `testbed` is for the data set `testbed`"
            f" and no other; pass --reward with one of {', '.join(REWARDS)}."
        )
    if entry == TESTBED:
        return build_problems(split, n, seed=seed)
    # Of rows with the same prompt the first counts, so that none can be met again.
    rows = {_text(row["prompt"]): row for row in reversed(_part(entry, args, split))}
    order = sorted(rows, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    if not order or (n is not None and n > len(order)):
        raise ValueError(
            f"the {split} part of {entry} has {len(order)} different prompts, and {'some' if n is None else n} are "
            "needed; ask for fewer, or use a larger data set."
        )
    return [rows[text] for text in order[:n]]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _part(entry: str, args: argparse.Namespace, split: str) -> list[Row]:
    """The rows of one split under our column names: the source's own, or a share by hash where it has none."""
    columns = _Columns(entry, args)
    if Path(entry).suffix in (".jsonl", ".json"):
        tables: dict[str, Any] = {"": _read_file(Path(entry))}
    else:
        tables = _read_datasets(entry)
    if len(tables) == 1:
        # Even where its one split is called "test": the other two parts would otherwise be taken from it as well.
        (rows,) = tables.values()
        own: set[str] = set()
    elif split in tables and split != "train":
        return columns.rows(tables[split])
    elif "train" in tables:
        rows, own = tables["train"], set(tables)
    else:
        raise ValueError(f"{entry} has the splits {sorted(tables)} and no `train`; pass {entry}:SPLIT to name one.")
    # A share that the source has a split of its own for stays with the training rows.
    parts = {split} | (own if split == "train" else set())
    return [row for row in columns.rows(rows) if _hashed_split(row["prompt"]) in parts]


def _hashed_split(prompt: Any) -> str:
    """From the prompt alone, so the same on every machine, whatever rows are added."""
    bucket = int.from_bytes(hashlib.sha256(_text(prompt).encode()).digest()[:8], "big") % 100
    if bucket < _TEST_PERCENT:
        return "test"
    return "validation" if bucket < _TEST_PERCENT + _VALIDATION_PERCENT else "train"


class _Columns:
    """Which columns of a source a command needs, and under which names; `args` are the task arguments."""

    def __init__(self, entry: str, args: argparse.Namespace) -> None:
        self.entry, self.after = entry, args.solution_after
        self.needed = {"prompt": args.prompt_column}
        scored = REWARDS[args.reward]
        if scored is not None:
            self.needed[scored] = args.solution_column or scored
        # Of the code data sets some name the function to test.
        self.optional = {"entry_point": "entry_point"} if args.reward == "code" else {}

    def rows(self, table: Any) -> list[Row]:
        """The rows of a list of dicts or of a `datasets.Dataset`, renamed and checked."""
        if hasattr(table, "select_columns"):
            self._check(table.column_names)
            # Other columns may be large, and rows become Python objects here.
            known = dict.fromkeys([*self.needed.values(), *self.optional.values()])
            table = table.select_columns([column for column in known if column in table.column_names])
        return [self._renamed(row, f"row {index} of {self.entry}") for index, row in enumerate(table)]

    def _check(self, found: Iterable[str], where: str = "") -> None:
        missing = [column for column in self.needed.values() if column not in found]
        if missing:
            raise ValueError(
                f"{where or self.entry} has the columns {sorted(found)} and not {missing}; name the right ones with "
                "--prompt-column and --solution-column."
            )

    def _renamed(self, row: Row, where: str) -> Row:
        self._check(row, where)
        renamed = {name: row[column] for name, column in self.needed.items()}
        for name, column in self.needed.items():
            if renamed[name] is None or renamed[name] in ("", []):
                raise ValueError(f"the `{column}` of {where} is {renamed[name]!r}; take such rows out first.")
        if not isinstance(renamed["prompt"], str | list):
            raise ValueError(
                f"the `{self.needed['prompt']}` of {where} is {renamed['prompt']!r:.200}; it has to be a text or a "
                "list of messages."
            )
        if self.after and "solution" in renamed:
            renamed["solution"] = self._behind_mark(str(renamed["solution"]), where)
        return renamed | {name: row.get(column) for name, column in self.optional.items()}

    def _behind_mark(self, text: str, where: str) -> str:
        _, mark, solution = text.rpartition(self.after)
        if not mark or not solution.strip():
            raise ValueError(
                f"the `{self.needed['solution']}` of {where} has nothing behind {self.after!r}, where --solution-after "
                f"looks: {text!r:.200}"
            )
        return solution.strip()


def _read_file(path: Path) -> list[Row]:
    """The rows of a JSON Lines file, or of a JSON file that is a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            # Not `splitlines`, which also splits at separators that may stand within a JSON text.
            rows = [_parsed(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset {path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"--dataset {path} has to hold rows that are JSON objects, one a line (.jsonl) or in a list (.json)."
        )
    return rows


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_datasets(entry: str) -> dict[str, Any]:
    """The splits of a folder or Hub id that `datasets` reads; a data set without splits has one of no name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    name, config, split = _entry_parts(entry)
    try:
        if any(Path(name, marker).exists() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if split else loaded
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # readers of other formats raise whatever they raise
        raise ValueError(f"--dataset {entry} cannot be loaded: {type(error).__name__}: {error}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def _entry_parts(entry: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; a folder may have colons in its name."""
    if Path(entry).exists():
        return entry, None, None
    name, *rest = entry.split(":")
    if len(rest) > 2 or not name:
        raise ValueError(f"--dataset {entry} has to be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.")
    split = rest.pop() if rest else ""
    return name, "".join(rest) or None, split or None
