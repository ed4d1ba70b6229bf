"""The README's tables of trained policies, made from the result files they came from."""

from __future__ import annotations

import json
from pathlib import Path

from hf_adaptive_decode.evaluation.table import format_interval, markdown_table

RESULTS = Path(__file__).parents[1] / "examples" / "results"
BASES = ("", "_base1", "_base2")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"policies_{name}.json").read_text(encoding="utf-8"))


def find(result: dict, parallel: int, budget: int | None = None) -> dict:
    return next(
        cell for cell in result["cells"] if (cell["parallel_budget"], cell["token_budget"]) == (parallel, budget)
    )


def row_of(cell: dict, start: str) -> dict:
    return next(row for row in cell["rows"] if row["decoder"].startswith(start))


def gain(cell: dict, start: str) -> str:
    return format_interval(row_of(cell, start)["gain"], sign=True)


def against_statics(experiment: str, twin: str) -> str:
    """One line a B: the best static, the policy, and its gains on three base models, over MeanShift and its twin."""
    results = [load(f"{experiment}{base}") for base in BASES]
    rows = []
    for parallel in (1, 2, 4, 8):
        cells = [find(result, parallel) for result in results]
        static = row_of(cells[0], "best static")
        named = static["decoder"].removeprefix("best static (").removesuffix(")")
        rows.append(
            [
                f"pass@{parallel}",
                f"{100 * static['pass']['mean']:.1f} ({named})",
                f"{100 * cells[0]['rows'][0]['pass']['mean']:.1f}",
                *(gain(cell, "best static") for cell in cells),
                gain(cells[0], "MeanShift"),
                gain(cells[0], twin),
            ]
        )
    header = ["", "best static", "policy", "gain", "base model 2", "base model 3", "over MeanShift", "over its twin"]
    return markdown_table(header, rows)


def cells_of(experiment: str) -> str:
    """The gain over the best static of each single cell."""
    result = load(experiment)
    budgets = result["token_budgets"]
    rows = [
        [f"B = {parallel}", *(gain(find(result, parallel, b), "best static of this cell") for b in budgets)]
        for parallel in (1, 2, 4, 8)
    ]
    return markdown_table(["gain over the best static of the cell", *(f"{b} tokens" for b in budgets)], rows)


def token_policy() -> str:
    """Every decoder beside the token policy at pass@1, on three base models."""
    cells = [find(load(f"token{base}"), 1) for base in BASES]
    rows = []
    for row in cells[0]["rows"]:
        kind = row["decoder"].split(" (")[0]
        others = [gain(cell, kind) if "gain" in row and kind != "entropy alone" else "" for cell in cells[1:]]
        own = format_interval(row["gain"], sign=True) if "gain" in row else ""
        rows.append([row["decoder"], format_interval(row["pass"]), own, *others])
    return markdown_table(["", "pass@1", "policy's gain", "base model 2", "base model 3"], rows)


def small_budgets() -> str:
    """The policy that is told b_t, its twin and greedy, for each small budget."""
    result = load("budget")
    names = list(result["training_seeds"])
    rows = []
    for budget in (None, *result["token_budgets"]):
        cell = find(result, 1, budget)
        told, twin = (format_interval(row_of(cell, name)["pass"]) for name in names)
        label = "all three" if budget is None else f"{budget} tokens"
        rows.append([label, told, twin, gain(cell, names[1]), gain(cell, "greedy"), gain(cell, "best static")])
    return markdown_table(["", "told b_t", "twin", "over its twin", "over greedy", "over the best static"], rows)
