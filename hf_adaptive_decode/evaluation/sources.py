"""Rows of problems out of files, data sets and Python objects, in splits that share no prompt; knows which columns a
reward reads and nothing of what is done with the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..testbed import build_problems
from ..testbed.problems import TYPES
from .rows import read_tables

TESTBED: Final = "testbed"
SPLITS: Final = ("train", "validation", "test")
# The columns that each reward reads besides the prompt, in its own words for them; the first holds what is right.
REWARDS: Final[dict[str, tuple[str, ...]]] = {
    TESTBED: (),
    "exact_match": ("solution",),
    "math": ("solution",),
    "code": ("tests",),
    "function": ("tests", "entry_point"),
}
# What the code data sets have beside their tests: the function to call, and what runs before the tests.
_ENTRY_POINT: Final = "entry_point"
_TEST_SETUP: Final = ("test_imports", "test_setup_code")
_TEST_PERCENT, _VALIDATION_PERCENT, _BENCHMARK_VALIDATION_PERCENT = 10, 10, 20
_PLACES: Final = re.compile(r"\{(prompt|tests)\}")

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    r"""
    Where problems come from, how they are asked and what scores them.

    A file, a set of one split and a named split are divided into train, validation and test (80/10/10) by a hash of the
    prompt; else the set's own splits are used, and those it lacks are taken from its train split in the same way.

    Args:
        dataset (`str`, `Path`, sequence of mappings, `datasets.Dataset`, or a mapping from splits to either):
            `"testbed"`, `"testbed:coin"` or `"testbed:coin+sign"` (the embedded problems, all or some of their types);
            a .jsonl or .json file; a folder or Hub id for `datasets`, as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; or rows
            that are already loaded.
        reward (`str` or `Callable`): One of `REWARDS`, or a function in TRL's signature, which is handed all columns.
        prompt_column (`str` or sequence of `str`): The column with the prompts, texts or message lists. Of several
            names the first that a row has counts.
        solution_column (`str` or sequence of `str`, *optional*): The column that the reward scores by; by default
            `solution`, `tests` for code, and none for a function of your own, which otherwise gets it as `solution`.
        solution_after (`str`, *optional*): The solution is what follows the last such text in its column (GSM8K:
            `####`).
        prompt_template (`str`, *optional*): How the problem is asked, with `{prompt}` where its text goes and
            `{tests}` where its tests do; all other braces stand as they are. The splits do not depend on it.
        chat (`bool`): Whether a text is asked as a user's message, for models with a chat template.
        benchmark (`bool`): Whether nothing of it is there to train on: where the hash divides, it makes a fifth of the
            problems validation and the rest test.

    Raises:
        `ValueError`: If there is no such reward, it does not fit the data set, or the template has no `{prompt}`.
    """

    dataset: Any
    reward: str | Callable[..., Sequence[float | None]]
    prompt_column: str | Sequence[str] = "prompt"
    solution_column: str | Sequence[str] | None = None
    solution_after: str | None = None
    prompt_template: str | None = None
    chat: bool = False
    benchmark: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.reward, str):
            check_reward(self.reward)
            if self.is_testbed != (self.reward == TESTBED):
                raise ValueError(
                    f"`reward={self.reward}` does not fit `dataset={self.label}`: the reward `testbed` is for the data "
                    f"set `testbed` and no other; pass `reward=` with one of {', '.join(REWARDS)}."
                )
        elif not callable(self.reward):
            raise ValueError(
                f"`reward=` is {self.reward!r}; it has to be one of {', '.join(REWARDS)}, or a function in TRL's "
                "signature."
            )
        if self.is_testbed:
            self._check_testbed()
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"`prompt_template={self.prompt_template}` has no place for the problem; write {{prompt}} where its "
                "text goes."
            )

    @property
    def is_testbed(self) -> bool:
        """Whether the problems are the embedded ones."""
        return isinstance(self.dataset, str) and self.dataset.partition(":")[0] == TESTBED

    @property
    def types(self) -> tuple[str, ...]:
        """The testbed's types of problem that `dataset` names."""
        _, colon, names = self.label.partition(":")
        return tuple(dict.fromkeys(names.split("+"))) if colon else TYPES

    @property
    def label(self) -> str:
        """What messages call the data set."""
        return str(self.dataset) if isinstance(self.dataset, str | Path) else "the given rows"

    def rows(self, split: str, n: int | None = None, seed: int = 0) -> list[Row]:
        """
        Rows with a `prompt` and the reward's columns: `solution`, or `tests` and `entry_point`.

        Which rows, and their order, depends on the seed and the prompts alone; fewer rows are the first of more.

        Args:
            split (`str`): `"train"`, `"validation"` or `"test"`; where the hash divides, no prompt is in two of them.
            n (`int`, *optional*): How many rows; all there are when `None` (of the testbed, as many as it gives).
            seed (`int`): Which ones.

        Raises:
            `ValueError`: If the source cannot be read, lacks a column or the rows.
            [`MissingExtraError`]: If `datasets` is needed and not installed.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}.")
        if self.is_testbed:
            rows = build_problems(split, n, self.types, seed=seed)
        else:
            # Of rows with the same prompt the first counts, so that none can be met again.
            found = {prompt_key(row["prompt"]): row for row in reversed(self._part(split))}
            order = sorted(found, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
            self._check_count(split, n, len(order))
            rows = [found[text] for text in order[:n]]
        return [row | {"prompt": self._asked(row)} for row in rows]

    def _check_count(self, split: str, n: int | None, found: int) -> None:
        if not found:
            raise ValueError(
                f"the {split} part of {self.label} is empty: the hash of their prompts puts all of its rows into "
                f"other parts; use a larger data set, or one with a split of its own called `{split}`."
            )
        if n is not None and not 0 <= n <= found:
            raise ValueError(
                f"the {split} part of {self.label} has {found} different prompts, and {n} are needed; ask for fewer, "
                "or use a larger data set."
            )

    def _check_testbed(self) -> None:
        if self.prompt_template is not None:
            raise ValueError("`prompt_template=` does not fit the testbed: its reward reads the bare prompt.")
        if self.chat:
            raise ValueError(
                "`chat=` asks through a chat template, and the testbed is for a model that has none; leave it out."
            )
        if not set(self.types) <= set(TYPES):
            raise ValueError(
                f"`dataset={self.label}` names no types of the testbed; write testbed alone, or testbed: and some of "
                f"{', '.join(TYPES)}, joined with +."
            )

    def _asked(self, row: Row) -> Any:
        """The prompt as the model is asked."""
        prompt = row["prompt"]
        if self.prompt_template is not None:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"`prompt_template=` is for prompts that are texts, and {self.label} has lists of messages; leave "
                    "it out."
                )
            tests = row.get("tests", ())
            words = {"prompt": prompt, "tests": tests if isinstance(tests, str) else "\n".join(map(str, tests))}
            prompt = _PLACES.sub(lambda place: words[place[1]], self.prompt_template)
        return [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt

    def _part(self, split: str) -> list[Row]:
        """The rows of one split under the reward's names: the source's own, or a share by hash where it has none."""
        columns, tables = _Columns(self), read_tables(self.dataset)
        if len(tables) == 1:
            # Even where its one split is called "test": the other two parts would otherwise be taken from it as well.
            (rows,) = tables.values()
            own: set[str] = set()
        elif split in tables and split != "train":
            return columns.rows(tables[split])
        elif "train" in tables:
            rows, own = tables["train"], set(tables)
        else:
            raise ValueError(
                f"{self.label} has the splits {sorted(tables)} and no `train`; pass {self.label}:SPLIT to name one."
            )
        divide = _benchmark_split if self.benchmark and len(tables) == 1 else _hashed_split
        # A share that the source has a split of its own for stays with the training rows.
        parts = {split} | (own if split == "train" else set())
        return [row for row in columns.rows(rows) if divide(row["prompt"]) in parts]


def check_reward(name: str) -> None:
    """
    Refuses a name that is no reward's.

    Raises:
        `ValueError`: If it is not one of `REWARDS`.
    """
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose one of {', '.join(REWARDS)}.")


def rows_in_turns(sources: Sequence[Source], split: str, n: int | None = None, seed: int = 0) -> list[Row]:
    """
    Rows of all sources, which take turns, so that every prefix of n rows is balanced.

    Args:
        sources (sequence of [`Source`]): The sources.
        split, seed: As [`Source.rows`] takes them.
        n (`int`, *optional*): How many rows in all; all there are when `None`.
    """
    counts = [None if n is None else len(range(turn, n, len(sources))) for turn in range(len(sources))]
    parts = [source.rows(split, count, seed) for source, count in zip(sources, counts, strict=True)]
    return [rows[turn] for turn in range(max(map(len, parts))) for rows in parts if turn < len(rows)]


def prompt_key(prompt: Any) -> str:
    """A prompt as one text, by which two are the same or not; a message list as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _bucket(prompt: Any) -> int:
    """0 to 99, from the prompt alone, so the same on every machine, whatever rows are added."""
    return int.from_bytes(hashlib.sha256(prompt_key(prompt).encode()).digest()[:8], "big") % 100


def _hashed_split(prompt: Any) -> str:
    bucket = _bucket(prompt)
    if bucket < _TEST_PERCENT:
        return "test"
    return "validation" if bucket < _TEST_PERCENT + _VALIDATION_PERCENT else "train"


def _benchmark_split(prompt: Any) -> str:
    return "validation" if _bucket(prompt) < _BENCHMARK_VALIDATION_PERCENT else "test"


class _Columns:
    """Which columns of a source its reward needs, and under which names."""

    def __init__(self, source: Source) -> None:
        self.label, self.after = source.label, source.solution_after
        self.needed = {"prompt": _names(source.prompt_column)}
        # A function of the user's own may read any column.
        self.keeps_all = not isinstance(source.reward, str)
        scored, *others = ["solution"] if not isinstance(source.reward, str) else REWARDS[source.reward]
        if isinstance(source.reward, str) or source.solution_column is not None:
            self.needed[scored] = _names(source.solution_column or scored)
        self.needed |= {name: (name,) for name in others}
        self.optional = (_ENTRY_POINT, *_TEST_SETUP) if "tests" in self.needed else ()

    def rows(self, table: Any) -> list[Row]:
        """The rows of a list of dicts or of a `datasets.Dataset`, renamed and checked."""
        if hasattr(table, "select_columns") and not self.keeps_all:
            names = self._found(table.column_names)
            # Other columns may be large, and rows become Python objects here.
            known = dict.fromkeys([*names.values(), *self.optional])
            table = table.select_columns([column for column in known if column in table.column_names])
        others = dict.fromkeys(name for row in table for name in row) if self.keeps_all else {}
        return [self._renamed(row, others, f"row {index} of {self.label}") for index, row in enumerate(table)]

    def _found(self, columns: Iterable[str], where: str = "") -> dict[str, str]:
        """The column of each name that the reward uses."""
        there = set(columns)
        found = {name: next(filter(there.__contains__, among), None) for name, among in self.needed.items()}
        missing = [" or ".join(self.needed[name]) for name, column in found.items() if column is None]
        if missing:
            raise ValueError(
                f"{where or self.label} has the columns {sorted(there)} and not {missing}; name the right ones with "
                "`prompt_column=` and `solution_column=`."
            )
        return {name: str(column) for name, column in found.items()}

    def _renamed(self, row: Mapping[str, Any], others: Iterable[str], where: str) -> Row:
        columns = self._found(row, where)
        renamed = {name: row.get(name) for name in others} | {name: row[column] for name, column in columns.items()}
        for name, column in columns.items():
            if renamed[name] is None or renamed[name] in ("", []):
                raise ValueError(f"the `{column}` of {where} is {renamed[name]!r}; take such rows out first.")
        if not isinstance(renamed["prompt"], str | list):
            raise ValueError(
                f"the `{columns['prompt']}` of {where} is {renamed['prompt']!r:.200}; it has to be a text or a list of "
                "messages."
            )
        if self.after and "solution" in columns:
            text = str(renamed["solution"])
            renamed["solution"] = self._behind_mark(text, f"the `{columns['solution']}` of {where}")
        return renamed | self._of_tests(row, renamed.get("tests"))

    def _of_tests(self, row: Mapping[str, Any], tests: Any) -> Row:
        """The function to call, and the tests with what runs before them."""
        if not self.optional:
            return {}
        before = [row.get(name) or [] for name in _TEST_SETUP]
        setup = [text for part in before for text in ([part] if isinstance(part, str) else part)]
        if setup:
            tests = [*setup, *([tests] if isinstance(tests, str) else tests)]
        return {"tests": tests, _ENTRY_POINT: row.get(_ENTRY_POINT)}

    def _behind_mark(self, text: str, where: str) -> str:
        _, mark, solution = text.rpartition(str(self.after))
        if not mark or not solution.strip():
            raise ValueError(f"{where} has nothing behind {self.after!r}, as `solution_after=` says: {text!r:.200}")
        return solution.strip()


def _names(columns: str | Sequence[str]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)
