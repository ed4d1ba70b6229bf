"""Finds the texts that heads are to be trained on as they are; knows columns and splits, no tokenizer."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..evaluation.rows import read_tables
from ..evaluation.sources import TESTBED, Source, prompt_key
from .tasks import named_as_flags, read_source

# What each format has to have, with the types that its columns hold, and what it may have beside that.
_FORMATS: dict[str, dict[str, Any]] = {
    "input_ids": {"input_ids": list},
    "prompt": {"prompt": str | list, "completion": str | list},
    "messages": {"messages": list},
    "text": {"text": str},
}
_BESIDE = {
    "input_ids": ("labels", "low_prompt_ids", "high_prompt_ids"),
    "prompt": ("low_prompt", "high_prompt"),
}


@dataclass(frozen=True)
class Texts:
    """
    Rows to train on, in one of TRL's formats.

    Args:
        rows (sequence of mappings or [`~datasets.Dataset`]): The rows.
        found (`int`): How many the sources have altogether.
        note (`str`): Why there are fewer rows, or nothing.
    """

    rows: Any
    found: int
    note: str


def load_texts(args: argparse.Namespace) -> Texts:
    """
    The rows of all of `--dataset`, under the names that the trainer knows.

    Args:
        args (`argparse.Namespace`): With `dataset`, `prompt_column`, `completion_column`, `prompt_template`,
            `chat`, `hold_out`, `train_problems` and `seed`.

    Raises:
        `ValueError`: If a source cannot be read, has the columns of no format, or a row lacks one.
        [`MissingExtraError`]: If `datasets` is needed and not installed.
    """
    if args.prompt_template is not None and "{prompt}" not in args.prompt_template:
        raise ValueError(f"--prompt-template {args.prompt_template} has no {{prompt}} where the prompt's text goes.")
    entries = list(dict.fromkeys(args.dataset))
    parts, found = [], 0
    for entry in entries:
        if entry.partition(":")[0] == TESTBED:
            raise ValueError("--dataset testbed holds problems and no texts; leave --no-sample out.")
        with named_as_flags():
            part, total = _part(entry, args)
        parts.append(part)
        found += total
    formats = {_format(_columns(part)): entry for entry, part in zip(entries, parts, strict=True)}
    if len(formats) > 1:
        (first, one), (second, other), *_ = formats.items()
        raise ValueError(
            f"--dataset {one} has the column `{first}` and {other} has `{second}`; train on one at a time."
        )
    rows = parts[0] if len(parts) == 1 else [dict(row) for part in parts for row in part]
    held_out, there = found - len(rows), len(rows)
    if args.train_problems is not None and args.train_problems < there:
        chosen = sorted(random.Random(args.seed).sample(range(there), args.train_problems))
        rows = _chosen(rows, chosen)
    if "prompt" in formats and (args.chat or args.prompt_template is not None):
        asked = partial(_asked, template=args.prompt_template, chat=args.chat)
        rows = rows.map(asked) if hasattr(rows, "map") else [asked(row) for row in rows]
    return Texts(rows, found, f"; {held_out:,} are held out for `evaluate`" if held_out else "")


def _part(entry: str, args: argparse.Namespace) -> tuple[Any, int]:
    """The training rows of one source under the trainer's names, and how many it had before some were held out."""
    tables = {split: _renamed(table, entry, args) for split, table in read_tables(read_source(entry)).items()}
    if len(tables) > 1 and "train" not in tables:
        raise ValueError(
            f"--dataset {entry} has the splits {sorted(tables)} and no `train`; pass {entry}:SPLIT to name one."
        )
    table = tables.get("train", next(iter(tables.values())))
    if not args.hold_out or "prompt" not in _columns(table):
        return table, len(table)
    prompts = {split: _prompts_of(one) for split, one in tables.items()}
    # Which ones is for `Source` to say, as it says it to `evaluate`.
    source = Source(prompts, _no_reward)
    kept = {prompt_key(row["prompt"]) for row in source.rows("train")}
    chosen = [
        place
        for place, row in enumerate(prompts["train" if "train" in tables else next(iter(tables))])
        if prompt_key(row["prompt"]) in kept
    ]
    return _chosen(table, chosen), len(table)


def _no_reward(**columns: Any) -> list[float | None]:
    raise NotImplementedError("these rows are read for their prompts alone")


def _prompts_of(table: Any) -> list[dict[str, Any]]:
    prompts = table["prompt"] if hasattr(table, "map") else [row["prompt"] for row in table]
    return [{"prompt": prompt} for prompt in prompts]


def _renamed(table: Any, entry: str, args: argparse.Namespace) -> Any:
    """A table with the columns of its format alone, each row checked."""
    names = {args.prompt_column: "prompt", args.completion_column: "completion"}
    there = _columns(table)
    if not set(names) <= set(there):
        names = {}
    columns = [names.get(column, column) for column in there]
    kind = _format(columns)
    if kind is None:
        raise ValueError(
            f"--dataset {entry} has the columns {sorted(there)}; texts are `prompt` and `completion` (or what "
            "--prompt-column and --completion-column name), `messages`, `text` or `input_ids`. Problems that the model "
            "is to solve itself take --sample, with --reward."
        )
    wanted = [*_FORMATS[kind], *(name for name in _BESIDE.get(kind, ()) if name in columns)]
    old = {name: there[columns.index(name)] for name in wanted}
    if hasattr(table, "map"):
        table = table.select_columns(list(old.values()))
        table = table.rename_columns({before: name for name, before in old.items() if before != name})
    else:
        table = [{name: row.get(before) for name, before in old.items()} for row in table]
    for index, row in enumerate(table):
        _check(row, _FORMATS[kind], old, f"row {index} of {entry}")
    return table


def _check(row: Mapping[str, Any], types: Mapping[str, Any], old: Mapping[str, str], where: str) -> None:
    for name, kind in types.items():
        if not isinstance(row[name], kind) or not row[name]:
            what = "a text" if kind is str else "a list" if kind is list else "a text or a list of messages"
            raise ValueError(f"the `{old[name]}` of {where} is {row[name]!r:.100}; it has to be {what}, and not empty.")
        if isinstance(row[name], list) and name != "input_ids" and not all(map(_is_message, row[name])):
            raise ValueError(f"the `{old[name]}` of {where} is no list of messages with `role` and `content`.")
    if "prompt" in types and type(row["prompt"]) is not type(row["completion"]):
        raise ValueError(f"of {where} one of prompt and completion is a text and the other a list of messages.")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _columns(table: Any) -> list[str]:
    return list(table.column_names if hasattr(table, "map") else dict.fromkeys(name for row in table for name in row))


def _format(columns: Sequence[str]) -> str | None:
    return next((name for name, needed in _FORMATS.items() if set(needed) <= set(columns)), None)


def _chosen(table: Any, places: list[int]) -> Any:
    return table.select(places) if hasattr(table, "map") else [table[place] for place in places]


def _asked(row: Mapping[str, Any], template: str | None, chat: bool) -> dict[str, Any]:
    """A plain prompt as the model is asked, and its completion as the model is to answer."""
    if not isinstance(row["prompt"], str):
        return dict(row)
    prompts = {name: text for name, text in row.items() if name.endswith("prompt") and text}
    if template is not None:
        prompts = {name: template.replace("{prompt}", text) for name, text in prompts.items()}
    if not chat:
        return {**row, **prompts}
    said = {name: [{"role": "user", "content": text}] for name, text in prompts.items()}
    return {**row, **said, "completion": [{"role": "assistant", "content": row["completion"]}]}
