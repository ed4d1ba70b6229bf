"""Keeps scored completions by the run that they belong to, on disk as they are made; knows no model and no reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .lines import AppendedLines

# For readers of the file, and for those who ask for a whole line: those of a large run would fill the memory.
_LONG = {"text", "token_ids"}
Place = tuple[int, int]


class CompletionStore:
    """
    Scored completions by run and place, which are a problem and a sample: in memory all but their text.

    Args:
        path (`Path`, *optional*): A file with a line for each run and one for each of its completions.
        keeps_whole (`bool`): Whether, without a file, the texts stay in memory too.

    Raises:
        `ValueError`: If a line of the file is damaged.
    """

    def __init__(self, path: Path | None = None, keeps_whole: bool = False) -> None:
        self._keeps_whole = keeps_whole
        self._file = None if path is None else AppendedLines(path, _short)
        self._runs: dict[str, dict[Place, dict[str, Any]]] = {}
        self._whole: dict[tuple[str, Place], Any] = {}
        if self._file is None:
            return
        for at, line in zip(self._file.places, self._file.found, strict=True):
            run = self._runs.setdefault(line["run"], {})
            if "problem" in line:
                place = line["problem"], line["sample"]
                run[place], self._whole[line["run"], place] = line, at

    def run(self, facts: Mapping[str, Any], decoder: str) -> str:
        """The short name of the run that `facts` describe, which is begun if it is new; `decoder` is for readers."""
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        if name not in self._runs:
            self._runs[name] = {}
            if self._file is not None:
                self._file.append([{"run": name, "decoder": decoder, **facts}])
        return name

    def done(self, run: str) -> dict[Place, dict[str, Any]]:
        """The completions of a run by `(problem, sample)`, without their text and tokens."""
        return self._runs[run]

    def whole(self, run: str, place: Place) -> dict[str, Any]:
        """
        A completion with all that was added, as far as there is a file or `keeps_whole`.

        Raises:
            `ValueError`: If somebody else has written to the file.
        """
        kept = self._whole[run, place]
        if self._file is None:
            return dict(kept)
        line = self._file.read(kept)
        if (line.get("run"), line.get("problem"), line.get("sample")) != (run, *place):
            raise ValueError(f"{self._file.path} was changed meanwhile, perhaps by another run; start this one again.")
        return line

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keeps completions that have ended."""
        kept: Sequence[Any] = lines if self._file is None else self._file.append(lines)
        for line, whole in zip(lines, kept, strict=True):
            place = line["problem"], line["sample"]
            self._runs[line["run"]][place] = _short(line)
            if self._file is not None or self._keeps_whole:
                self._whole[line["run"], place] = whole


def _short(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _LONG}
