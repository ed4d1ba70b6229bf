"""Reads tables of rows out of files, data sets and Python objects; knows nothing of columns, splits or rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError


def read_tables(dataset: Any) -> dict[str, Any]:
    """
    The tables of a data set by their split; one without splits has a single table of no name.

    Args:
        dataset (`str`, `Path`, sequence of mappings, `datasets.Dataset`, or a mapping from splits to either): A .jsonl
            or .json file; a folder or Hub id for `datasets`, as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; or rows that
            are already loaded.

    Raises:
        `ValueError`: If it cannot be read or holds no rows.
        [`MissingExtraError`]: If `datasets` is needed and not installed.
    """
    if isinstance(dataset, str | Path):
        path = Path(dataset)
        return {"": _read_file(path)} if path.suffix in (".jsonl", ".json") else _read_datasets(str(dataset))
    tables = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    for split, table in tables.items():
        is_list = isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table)
        if not (is_list or hasattr(table, "select_columns")) or not len(table):
            raise ValueError(
                f"`dataset=` is {table!r:.200}{f' in split {split!r}' if split else ''}; it has to be a path, a Hub id,"
                " a `datasets.Dataset`, a list of dicts, or a dict from splits to those, and hold rows."
            )
    return tables


def _read_file(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, or of a JSON file that is a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            # Not `splitlines`, which also splits at separators that may stand within a JSON text.
            rows = [_parsed(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"`dataset={path}` cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"`dataset={path}` has to hold rows that are JSON objects, one a line (.jsonl) or in a list (.json)."
        )
    return rows


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_datasets(entry: str) -> dict[str, Any]:
    """The splits of a folder or Hub id that `datasets` reads."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    name, config, split = entry_parts(entry)
    try:
        if any(Path(name, marker).exists() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if split else loaded
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # readers of other formats raise whatever they raise
        raise ValueError(f"`dataset={entry}` cannot be loaded: {type(error).__name__}: {error}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def entry_parts(entry: str) -> tuple[str, str | None, str | None]:
    """
    Name, configuration and split of NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; a folder may have colons in its name.

    Args:
        entry (`str`): The data set.

    Raises:
        `ValueError`: If it has another form.

    Example:
        >>> entry_parts("openai/gsm8k:main:")
        ('openai/gsm8k', 'main', None)
    """
    if Path(entry).exists():
        return entry, None, None
    name, *rest = entry.split(":")
    if len(rest) > 2 or not name:
        raise ValueError(f"`dataset={entry}` has to be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.")
    split = rest.pop() if rest else ""
    return name, "".join(rest) or None, split or None
