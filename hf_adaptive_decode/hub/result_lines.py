"""The lines of a results.jsonl, read without trusting them; knows JSON, nothing of models, metrics or cards."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterLoadError

RESULTS_FILE = "results.jsonl"
FORMAT = 1
METRIC = re.compile(r"(pass|maj)@(\d+)")
Line = Mapping[str, Any]
_NEEDED: dict[str, dict[str, type]] = {
    "provenance": {"library": str, "seeds": list, "versions": dict, "hardware": dict, "started": str},
    "measure": {"task": str, "adapter": str, "decoder": str, "role": str, "problems": int, "samples": int},
    "verdict": {"task": str, "adapter": str, "k": int, "verdict": str, "sentence": str, "confidence": float},
}


def read_results(results: Sequence[Line] | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    The lines of a `results.jsonl` that a card shows: where the numbers come from, adapters' measures and verdicts.

    Args:
        results (sequence of mappings, `str` or `os.PathLike`): The lines, or the file that holds them.

    Raises:
        [`AdapterLoadError`]: If a line is no JSON object, lacks something or holds a number that is none; if the format
            is newer than this library; if no line says where the numbers come from, or none holds an adapter's.
    """
    if isinstance(results, str | os.PathLike):
        source, given = os.fspath(results), _parsed(Path(results))
    else:
        source, given = "results", list(results)
    lines = []
    for number, line in enumerate(given, start=1):
        if not isinstance(line, Mapping):
            raise AdapterLoadError(f"{source}, line {number}: it has to be a JSON object; measure again or mend it.")
        if line.get("kind") in _NEEDED:
            problem = _problem(line)
            if problem:
                raise AdapterLoadError(
                    f"{source}, line {number} ({line['kind']}): {problem}; measure again or mend it."
                )
            if line["kind"] == "provenance" or line["adapter"] is not None:
                lines.append(dict(line))
    for kind, role in (("provenance", None), ("measure", "adapter")):
        if not any(line["kind"] == kind and line.get("role") == role for line in lines):
            wanted = f'a line of kind "{kind}"' + (f' and role "{role}"' if role else "")
            raise AdapterLoadError(f"{source} lacks {wanted}; is this the results.jsonl of an evaluation?")
    return lines


def _parsed(path: Path) -> list[Any]:
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise AdapterLoadError(f"{path}, line {number}: no JSON ({error}); measure again or mend it.") from error
    return lines


def _problem(line: Line) -> str | None:
    """What is wrong with a line, if anything."""
    for name, kind in _NEEDED[line["kind"]].items():
        value = line.get(name)
        ok = is_number(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)
        if not ok and not (name == "adapter" and value is None):  # a base model that was measured alone
            return f"`{name}` is {value!r} and has to be a {kind.__name__}"
    if line["kind"] == "provenance" and line.get("format") != FORMAT:
        return (
            f"its format is {line.get('format')!r}, and this version reads {FORMAT}: pip install -U hf_adaptive_decode"
        )
    if line["kind"] != "provenance" and not all(_is_count(budget) for budget in budgets_of(line)):
        return f"`token_budget` is {line.get('token_budget')!r} and has to be a whole number of at least 1"
    for name in ("gain", "static", "by_training_seed"):
        if line.get(name) is not None and not isinstance(line[name], Mapping):
            return f"`{name}` is {line[name]!r} and has to be an object or null"
    intervals = [(name, line[name]) for name in line if METRIC.fullmatch(name)] + [*(line.get("gain") or {}).items()]
    wrong = [(name, value) for name, value in intervals if not _is_interval(value)]
    if wrong:
        return f"`{wrong[0][0]}` is {wrong[0][1]!r} and has to hold the numbers mean, low and high"
    for value in (line.get("by_training_seed") or {}).values():
        if not isinstance(value, list):
            return f"`by_training_seed` holds {value!r} and has to hold lists"
    for name, value in (line.get("static") or {}).items():
        if not is_number(value):
            return f"`static` has {name} {value!r}, which has to be a number"
    return None


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def budgets_of(line: Line) -> tuple[Any, ...]:
    """Of how many new tokens the line is; several where it is a mean over budgets."""
    several = line.get("token_budgets")
    return tuple(several) if isinstance(several, list) and several else (line.get("token_budget"),)


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and all(is_number(value.get(name)) for name in ("mean", "low", "high"))
