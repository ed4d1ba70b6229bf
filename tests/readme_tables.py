"""The README's tables of the demo and of trained policies, made from the result files they came from."""

from __future__ import annotations

import json
from pathlib import Path

from hf_adaptive_decode.evaluation import Evaluation
from hf_adaptive_decode.evaluation.table import format_interval, markdown_table

RESULTS = Path(__file__).parents[1] / "examples" / "results"
BASES = ("", "_base1", "_base2")
KINDS = {"mean_shift": "MeanShift", "best_static": "best static", "masked_static": "best masked static"}
# In which order a table shows them.
ROLES = ("adapter", "rival", "greedy", "default", "mean_shift", "mixture", "best_static", "masked_static")


def load(name: str) -> Evaluation:
    return Evaluation.load(RESULTS / f"policies_{name}.jsonl")


def find(found: Evaluation, role: str, parallel: int, budget: int | None = None) -> dict:
    """The measure of a role for a B under one token budget, or under all of them."""
    budgets = found.lines[0]["token_budgets"] if budget is None else [budget]
    return next(
        line
        for line in found.measures
        if (line["role"], line["token_budgets"]) == (role, budgets) and line["for_k"] in (None, parallel)
    )


def rate(found: Evaluation, role: str, parallel: int, budget: int | None = None) -> str:
    return format_interval(find(found, role, parallel, budget)[f"pass@{parallel}"])


def gain(found: Evaluation, role: str, parallel: int, budget: int | None = None) -> str:
    return format_interval(find(found, role, parallel, budget)["gain"][f"pass@{parallel}"], sign=True)


def label(line: dict) -> str:
    name = line["decoder"].removeprefix("uniform ").removesuffix(" where unsure")
    return f"{KINDS[line['role']]} ({name})" if line["role"] in KINDS else name


def against_statics(experiment: str) -> str:
    """One line a B: the best static, the policy, and its gains on three base models, over MeanShift and its twin."""
    results = [load(f"{experiment}{base}") for base in BASES]
    rows = []
    for parallel in (1, 2, 4, 8):
        static, policy = (find(results[0], role, parallel) for role in ("best_static", "adapter"))
        rows.append(
            [
                f"pass@{parallel}",
                f"{100 * static[f'pass@{parallel}']['mean']:.1f} ({static['decoder']})",
                f"{100 * policy[f'pass@{parallel}']['mean']:.1f}",
                *(gain(result, "best_static", parallel) for result in results),
                *(gain(results[0], role, parallel) for role in ("mean_shift", "rival")),
            ]
        )
    header = ["", "best static", "policy", "gain", "base model 2", "base model 3", "over MeanShift", "over its twin"]
    return markdown_table(header, rows)


def cells_of(experiment: str) -> str:
    """The gain over the best static of each single cell."""
    result = load(experiment)
    budgets = result.lines[0]["token_budgets"]
    rows = [[f"B = {k}", *(gain(result, "best_static", k, b) for b in budgets)] for k in (1, 2, 4, 8)]
    return markdown_table(["gain over the best static of the cell", *(f"{b} tokens" for b in budgets)], rows)


def token_policy() -> str:
    """Every decoder beside the token policy at pass@1, on three base models."""
    first, *others = (load(f"token{base}") for base in BASES)
    rows = []
    for role in ROLES:
        # The ablation was trained on one base model.
        on_others = ["" if role in ("adapter", "rival") else gain(result, role, 1) for result in others]
        own = "" if role == "adapter" else gain(first, role, 1)
        rows.append([label(find(first, role, 1)), rate(first, role, 1), own, *on_others])
    return markdown_table(["", "pass@1", "policy's gain", "base model 2", "base model 3"], rows)


def small_budgets() -> str:
    """The policy that is told b_t, its twin and greedy, for each small budget."""
    result = load("budget")
    rows = []
    for budget in (None, *result.lines[0]["token_budgets"]):
        rates = [rate(result, role, 1, budget) for role in ("adapter", "rival")]
        gains = [gain(result, role, 1, budget) for role in ("rival", "greedy", "best_static")]
        rows.append(["all three" if budget is None else f"{budget} tokens", *rates, *gains])
    return markdown_table(["", "told b_t", "twin", "over its twin", "over greedy", "over the best static"], rows)


def commands() -> str:
    """What commands do to T and top-p, before and after targeted training: means over seeds and held-out commands."""
    runs = json.loads((RESULTS / "language_control.json").read_text(encoding="utf-8"))["runs"]
    rows = []
    for stage, name in (("before targeted training", "before"), ("after targeted training", "after")):
        for direction in ("low", "high"):
            found = [
                row
                for run in runs
                for row in run[stage]["control"]["rows"]
                if (row["direction"], row["text"]) == (direction, "own")
            ]
            cells = []
            for parameter in ("temperature", "top_p"):
                shares = [100 * row[parameter]["consistency"] for row in found]
                cells.append(f"{sum(row[parameter]['difference'] for row in found) / len(found):+.3f}")
                cells.append(f"{sum(shares) / len(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f})")
            rows.append([f"{name}, {direction}", *cells])
    header = ["", "difference in T", "consistency (T)", "difference in top-p", "consistency (top-p)"]
    return markdown_table(header, rows)


def pass_rates() -> dict[str, dict[str, float]]:
    """pass@1 in per cent by stage and command, means over seeds."""
    runs = json.loads((RESULTS / "language_control.json").read_text(encoding="utf-8"))["runs"]
    stages = [name for name in runs[0] if name not in ("seed", "rows")]
    return {
        stage: {
            command: 100 * sum(run[stage]["pass@1"][command]["mean"] for run in runs) / len(runs)
            for command in ("none", "low", "high")
        }
        for stage in stages
    }
