"""What an evaluation found, as JSON Lines and as tables; knows nothing of models or of how it was found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub.results import ROLES
from .table import format_interval, markdown_table


class Evaluation:
    """
    The results of [`~evaluation.evaluate_decoding`].

    Args:
        lines (sequence of `dict`): The first of kind `"provenance"`; then for each task, token budget and adapter those
            of kind `"measure"` (the adapter's own first) and of kind `"verdict"`.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.lines = [dict(line) for line in lines]

    @property
    def measures(self) -> list[dict[str, Any]]:
        """The lines of kind `"measure"`."""
        return [line for line in self.lines if line["kind"] == "measure"]

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The lines of kind `"verdict"`."""
        return [line for line in self.lines if line["kind"] == "verdict"]

    def find(self, role: str, **facts: Any) -> dict[str, Any]:
        """
        The first measure with this role, and whatever other fields are named.

        Raises:
            `KeyError`: If there is none.
        """
        for line in self.measures:
            if line["role"] == role and all(line.get(name) == value for name, value in facts.items()):
                return line
        raise KeyError(f"no measure has the role {role!r} and {facts}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the lines, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}")
        staged.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        os.replace(staged, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Reads what [`~Evaluation.save`] wrote."""
        return cls([json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line])

    def table(self) -> str:
        """Every decoder's rates in per cent, with the adapter's paired gain over it: a Markdown table for each cell."""
        cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for line in self.measures:
            cells.setdefault((line["task"], tuple(line["token_budgets"]), line["adapter"]), []).append(line)
        return "\n\n".join(_block(lines) for lines in cells.values())

    def summary(self) -> str:
        """The verdicts, a line each."""
        several = len({(line["task"], line["token_budget"], line["adapter"]) for line in self.verdicts}) > 1
        return "\n".join(
            f"{_where(line)}: {line['sentence']}" if several else line["sentence"] for line in self.verdicts
        )


def _where(line: Mapping[str, Any]) -> str:
    budgets = " and ".join(map(str, line["token_budgets"]))
    return f"{line['adapter']} on {line['task']} ({budgets} tokens)"


def _block(lines: Sequence[Mapping[str, Any]]) -> str:
    shown = _without_repeats(lines)
    metrics = list(dict.fromkeys(name for line in shown for name in line if name.startswith(("pass@", "maj@"))))
    gained = [name for name in metrics if any(name in line.get("gain", {}) for line in shown)]
    task, adapter = lines[0]["task"], lines[0]["adapter"]
    title = f"{task}, {' and '.join(map(str, lines[0]['token_budgets']))} tokens"
    header = [title, *metrics, *(f"gain of {adapter} at {name}" for name in gained)]
    rows = []
    for line in shown:
        rates = [format_interval(line[name]) if name in line else "" for name in metrics]
        gains = line.get("gain", {})
        differences = [format_interval(gains[name], sign=True) if name in gains else "" for name in gained]
        rows.append([label(line), *rates, *differences])
    return markdown_table(header, rows)


def label(line: Mapping[str, Any]) -> str:
    """What a table calls the decoder of a measure."""
    role, decoder = line["role"], line["decoder"]
    where = f", in {line['engine']}" if "engine_refused" in line else ""
    if role not in ROLES:
        return f"{decoder}{where}"
    given = f" for pass@{line['for_k']}" if line["for_k"] is not None else ""
    # Decoders of rules carry their own name in front of their parameters.
    return f"{ROLES[role]}{given} ({decoder.removeprefix(role).strip(' ()')}){where}"


def _without_repeats(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row for what was chosen alike for several k, and none twice."""
    seen: dict[Any, Mapping[str, Any]] = {}
    for line in lines:
        key = (line["role"], line["decoder"], str(line["settings"]))
        known = seen.get(key, {})
        gain = {**line.get("gain", {}), **known.get("gain", {})}
        merged = {**line, **known, **({"for_k": None} if known else {})}
        seen[key] = {**merged, "gain": gain} if gain else merged
    return list(seen.values())
