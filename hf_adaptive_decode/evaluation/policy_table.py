"""A comparison of policies as plain text tables; knows `compare_policies`' result and nothing of how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .table import format_interval, markdown_table

_OF_CELL = "best static of this cell"


def policy_table(result: Mapping[str, Any]) -> str:
    """
    pass@B of every decoder with the first policy's paired gain over it, and that policy's gain in every single cell.

    There is one block for each parallel budget, with all token budgets together, and, if there are several of these, at
    the end the gains over the best static of each cell, which was chosen for that very pair of budgets.

    Args:
        result (mapping): What [`~evaluation.policies.compare_policies`] returns, fresh or read back from JSON.

    Returns:
        `str`: Aligned Markdown, in per cent with 95 % intervals.
    """
    main = next(iter(result["training_seeds"]))
    seeds = {name: f"{name} (mean of {count} seeds)" for name, count in result["training_seeds"].items() if count > 1}
    pooled = [cell for cell in result["cells"] if cell["token_budget"] is None]
    single = [cell for cell in result["cells"] if cell["token_budget"] is not None]
    together = ", all token budgets together" if single else ""
    blocks = [_block(cell, f"B = {cell['parallel_budget']}{together}", main, seeds) for cell in pooled]
    return "\n\n".join([*blocks, *([_gains(single, main)] if single else [])])


def _block(cell: Mapping[str, Any], title: str, main: str, seeds: Mapping[str, str]) -> str:
    """One parallel budget's decoders."""
    rows = []
    for row in cell["rows"]:
        gain = format_interval(row["gain"], sign=True) if "gain" in row else ""
        rows.append([seeds.get(row["decoder"], row["decoder"]), format_interval(row["pass"]), gain])
    return markdown_table([title, f"pass@{cell['parallel_budget']}", f"gain of {main}"], rows)


def _gains(cells: Sequence[Mapping[str, Any]], main: str) -> str:
    """The first policy's gain over the best static of each cell, B by token budget."""
    found = {(cell["parallel_budget"], cell["token_budget"]): _gain(cell) for cell in cells}
    parallel, tokens = (sorted({key[place] for key in found}) for place in (0, 1))
    rows = [[f"B = {b}", *(found.get((b, budget), "") for budget in tokens)] for b in parallel]
    header = [f"gain of {main} over the {_OF_CELL}", *(f"{budget} tokens" for budget in tokens)]
    return markdown_table(header, rows)


def _gain(cell: Mapping[str, Any]) -> str:
    rows = [row for row in cell["rows"] if row["decoder"].startswith(_OF_CELL)]
    return format_interval(rows[0]["gain"], sign=True) if rows else ""
