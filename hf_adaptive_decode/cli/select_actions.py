"""`hf-adaptive-decode select-actions`: an action set for action policies by greedy coverage; knows no training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..evaluation.provenance import environment
from .tasks import add_task_arguments, asked, count, load_model, load_problems, positive, reward_function

_PLOTTED = 20  # how many actions the figure goes up to, to show where more stop paying
_CAVEAT = (
    "F of a set is the mean over problems of its best action's mean reward. On the problems that chose the set it is "
    "optimistic: rewards are sampled, and some actions were lucky there. So compare sets on fresh problems. Even there "
    "F is an oracle's, which picks each problem's best action after the fact; more --samples leave less to luck."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task, the pool and the sizes; the defaults are for the embedded model."""
    parser.epilog = _CAVEAT
    parser.add_argument("--output", default="selected_actions", metavar="DIR", help="where the results go")
    parser.add_argument("--k", type=positive, default=6, help="how many actions to choose")
    parser.add_argument("--problems", type=positive, default=200, help="validation problems to choose on")
    parser.add_argument(
        "--check-problems",
        type=count,
        metavar="N",
        help="further validation problems to measure the chosen sets on; as many as --problems by default, 0 for none",
    )
    parser.add_argument("--samples", type=positive, default=8, help="completions of each problem for each candidate")
    parser.add_argument("--token-budget", type=positive, default=48, help="new tokens of each completion")
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument("--grid", default="full", choices=["full", "small"], help="the paper's 180 candidates, or 15")
    pool.add_argument("--pool", metavar="FILE.json", help="candidates of your own: a list like actions.json")
    parser.add_argument(
        "--extra-greedy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to add greedy decoding to the candidates",
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of problems and the sampling")
    parser.add_argument("--batch-rows", type=positive, default=256, help="sequences decoded at once")
    add_task_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the pool, chooses, measures the choice again and writes it; returns what it printed as numbers."""
    from transformers import logging

    from ..evaluation.pool import POOL_FILE, evaluate_pool

    started = time.perf_counter()
    logging.set_verbosity_error()
    pool = _pool(args)
    if args.k > len(pool):
        raise ValueError(f"--k is {args.k} and there are {len(pool)} candidates; ask for fewer or widen the pool.")
    reward = reward_function(args.reward)
    check = args.problems if args.check_problems is None else args.check_problems
    problems = load_problems(args, "validation", args.problems + check, args.seed)
    model, tokenizer = load_model(args)
    output = Path(args.output)
    how: dict[str, Any] = {name: vars(args)[name] for name in ("samples", "token_budget", "batch_rows")}
    chosen_on = problems[: args.problems]
    table = evaluate_pool(model, tokenizer, chosen_on, reward, pool, **how, seed=args.seed, folder=output)
    result = _selection(table, pool, args.k)
    (output / "actions.json").write_text(json.dumps(result["actions"], indent=2) + "\n", encoding="utf-8")
    result["check"] = None
    if check:
        columns = list(dict.fromkeys([*result["indices"], *result["top_by_mean"]["indices"]]))
        actions = [pool[column] for column in columns]
        # Another seed: the problems' places, which the draws come from as well, are the same again.
        fresh = evaluate_pool(model, tokenizer, problems[args.problems :], reward, actions, **how, seed=args.seed + 1)
        result["check"] = _check(fresh, columns, result)
    written = ["actions.json", POOL_FILE, *_plot(table, args.k, output)]
    print(_report(result, args, len(pool)))
    print(f"\nWritten to {output}: {', '.join(written)}.")
    result |= {"candidates": len(pool), "arguments": asked(args), "seconds": time.perf_counter() - started}
    return {**result, "environment": environment()}


def _pool(args: argparse.Namespace) -> list[dict[str, float]]:
    """The candidates, each once: a repeated one would take a place among the best by mean and add nothing there."""
    from ..actions import candidate_pool
    from ..configuration import AutoDecoConfig
    from ..evaluation.baselines import STATIC_GRID

    if args.pool is None:
        pool = candidate_pool() if args.grid == "full" else [dict(settings) for settings in STATIC_GRID]
    else:
        try:
            pool = json.loads(Path(args.pool).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--pool {args.pool} cannot be read: {error}") from error
        # Refuses what is no list of sampling configurations, and says why.
        AutoDecoConfig(policy="static", actions=pool)
    if args.extra_greedy and all(settings.get("temperature") != 0 for settings in pool):
        pool = [*pool, {"temperature": 0.0}]
    return [settings for index, settings in enumerate(pool) if settings not in pool[:index]]


def _selection(table: Any, pool: Sequence[dict[str, float]], k: int) -> dict[str, Any]:
    """Both sets in their order, F of their first 1 to k actions, and the best single candidate."""
    from ..actions import coverage_curve, select_actions, top_by_mean

    means = table.mean(axis=0)
    curve = coverage_curve(table, range(1, k + 1))

    def chosen(indices: list[int], name: str) -> dict[str, Any]:
        actions = [pool[index] for index in indices]
        return {
            "actions": actions,
            "indices": indices,
            "means": means[indices].tolist(),
            "coverage": curve[name][-1],
        }

    top = chosen(top_by_mean(table, k), "top_by_mean")
    static = {"settings": top["actions"][0], "index": top["indices"][0], "mean": top["means"][0]}
    greedy = chosen(select_actions(table, k), "greedy_coverage")
    return {**greedy, "top_by_mean": top, "best_static": static, "curve": curve}


def _check(fresh: Any, columns: list[int], result: dict[str, Any]) -> dict[str, Any]:
    """F of both sets and the mean of the best static on other problems, with intervals over problems."""
    from ..evaluation import bootstrap_interval

    def best_of(indices: list[int]) -> Any:
        return fresh[:, [columns.index(index) for index in indices]].max(axis=1)

    greedy, top = best_of(result["indices"]), best_of(result["top_by_mean"]["indices"])
    values = {
        "coverage": greedy,
        "top_by_mean": top,
        "best_static": best_of([result["best_static"]["index"]]),
        "coverage_minus_top_by_mean": greedy - top,
    }
    return {"problems": len(fresh), **{name: vars(bootstrap_interval(each)) for name, each in values.items()}}


def _report(result: dict[str, Any], args: argparse.Namespace, candidates: int) -> str:
    from ..actions import describe
    from ..evaluation.table import markdown_table

    greedy, top, curve = result, result["top_by_mean"], result["curve"]
    rows = []
    for place, k in enumerate(curve["k"]):
        covered, before = curve["greedy_coverage"][place], curve["greedy_coverage"][place - 1] if place else 0.0
        numbers = [f"{value:.3f}" for value in (greedy["means"][place], covered - before, covered)]
        others = [f"{value:.3f}" for value in (top["means"][place], curve["top_by_mean"][place])]
        names = [describe(each["actions"][place]) for each in (greedy, top)]
        rows.append([str(k), names[0], *numbers, names[1], *others])
    header = ["k", "greedy coverage", "mean reward", "adds", "F", "top k by mean reward", "mean reward", "F"]
    size = f"{args.problems} validation problems, {args.samples} samples each, token budget {args.token_budget}"
    static = result["best_static"]
    lines = [
        f"\n{candidates} candidates on {size}:\n\n{markdown_table(header, rows)}",
        f"\nBest single candidate: {describe(static['settings'])}, mean reward {static['mean']:.3f}.",
    ]
    if result["check"] is not None:
        lines.append(_checked_lines(result))
    return "\n".join([*lines, f"\n{_CAVEAT}"])


def _checked_lines(result: dict[str, Any]) -> str:
    from ..evaluation.table import markdown_table

    check = result["check"]

    def shown(name: str, sign: str = "") -> str:
        mean, low, high = (check[name][part] for part in ("mean", "low", "high"))
        return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    first, second, static = result["coverage"], result["top_by_mean"]["coverage"], result["best_static"]["mean"]
    rows = [
        ["greedy coverage, F", f"{first:.3f}", shown("coverage")],
        ["top k by mean reward, F", f"{second:.3f}", shown("top_by_mean")],
        ["greedy coverage minus top k", f"{first - second:+.3f}", shown("coverage_minus_top_by_mean", "+")],
        ["best single candidate, mean reward", f"{static:.3f}", shown("best_static")],
    ]
    header = [f"k = {len(result['indices'])}", "problems chosen on", f"{check['problems']} fresh problems [95 %]"]
    return f"\n{markdown_table(header, rows)}"


def _plot(table: Any, k: int, output: Path) -> list[str]:
    """Draws the figure if it can; returns the names of the files written."""
    from ..actions import coverage_curve
    from ..reports.plots import plot_coverage

    longest = min(table.shape[1], max(k, _PLOTTED))
    try:
        plot_coverage(coverage_curve(table, range(1, longest + 1)), output / "coverage.png")
    except MissingExtraError as error:
        print(f"coverage.png is left out: {error}", file=sys.stderr)
        return []
    return ["coverage.png"]
