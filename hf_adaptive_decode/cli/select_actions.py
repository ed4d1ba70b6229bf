"""`hf-adaptive-decode select-actions`: an action set for action policies by greedy coverage; knows no training."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .env import environment
from .tasks import add_task_arguments, load_model, load_problems, positive, reward_function

_PLOTTED = 20  # how many actions the figure goes up to, to show where more stop paying
_CAVEAT = (
    "F of a set is the mean over problems of its best action's mean reward. On the problems that chose the set it is "
    "optimistic: rewards are sampled, so some actions were lucky there. Compare sets on the fresh problems. Even there "
    "F is an oracle's, which knows the best action of each problem; it shrinks as --samples grows."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task, the pool and the sizes; the defaults are for the embedded model."""
    parser.epilog = _CAVEAT
    parser.add_argument("--output", default="selected_actions", metavar="DIR", help="where the results go")
    parser.add_argument("--k", type=positive, default=6, help="how many actions to choose")
    parser.add_argument("--problems", type=positive, default=200, help="validation problems to choose on")
    parser.add_argument(
        "--check-problems",
        type=_count,
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


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the pool, chooses, measures the choice again and writes it; returns what it printed as numbers."""
    from transformers import logging

    from ..evaluation.pool import evaluate_pool

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
    asked = problems[: args.problems]
    table = evaluate_pool(model, tokenizer, asked, reward, pool, **how, seed=args.seed, folder=output)
    result = _selection(table, pool, args.k)
    (output / "actions.json").write_text(json.dumps(result["actions"], indent=2) + "\n", encoding="utf-8")
    result["check"] = None
    if check:
        columns = list(dict.fromkeys([*result["indices"], *result["top_by_mean"]["indices"]]))
        actions = [pool[column] for column in columns]
        # Another seed: the problems' places, which the draws come from as well, are the same again.
        fresh = evaluate_pool(
            model, tokenizer, problems[args.problems :], reward, actions, **how, seed=args.seed + 1
        )
        result["check"] = _check(fresh, columns, result)
    say = sys.stderr if args.json == "-" else sys.stdout
    print(_report(result, args, len(pool)), file=say)
    _plot(table, args.k, output)
    print(f"\nWritten to {output}: {', '.join(sorted(_written(output)))}.", file=say)
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "json", "config")}
    result |= {"candidates": len(pool), "arguments": settings, "seconds": time.perf_counter() - started}
    return {**result, "environment": environment()}
