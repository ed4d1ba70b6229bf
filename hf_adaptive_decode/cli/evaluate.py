"""`hf-adaptive-decode evaluate`: adapters beside every baseline, with a verdict; knows no metric itself."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapters import load_for_adapters, static_settings
from .comparison import baselines_of, update_cards
from .engine_flags import add_engine_argument
from .pictures import has_pictures, write_gains
from .tasks import add_eval_task_arguments, add_model_arguments, load_tasks, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its adapters, the tasks, how much to sample, and what to compare with."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="folder or Hub id of an adapter; repeat it for several, with the same NAME for training seeds of one",
    )
    parser.add_argument(
        "--rival", action="append", default=[], metavar="[NAME=]DIR", help="another one to subtract, such as a twin"
    )
    add_model_arguments(parser)
    # So that an adapter's own base model is told from one that was asked for.
    parser.set_defaults(model=None)
    add_eval_task_arguments(parser)
    parser.add_argument("--samples", type=positive, default=8, help="completions of each problem and seed")
    parser.add_argument(
        "--k", type=positive, nargs="+", help="for which k: pass@k and maj@k; by default 1 and --samples"
    )
    parser.add_argument("--token-budget", type=positive, nargs="+", default=[256], help="new tokens, one or several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws --samples completions of its own")
    parser.add_argument(
        "--baselines",
        nargs="+",
        metavar="NAME",
        help="by default the standard ones; `fair` for all that are chosen on validation problems, or names: greedy, "
        "default, mean_shift, best_static, mixture, masked_static, shuffle, shuffle_in_bins, temperature_only, "
        "top_p_only, edt, dynatemp, min_p, turn, expert_search, top_of_pool, oracle_static, expert_search_oracle",
    )
    parser.add_argument(
        "--static",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="a static setting of your own as one more baseline: T=0.7,top_p=0.9 (also top_k and min_p); repeatable",
    )
    parser.add_argument("--batch-rows", type=positive, default=256, help="sequences decoded at once")
    add_engine_argument(parser, "; a baseline that it cannot is run in transformers")
    parser.add_argument("--output", default="evaluation", metavar="DIR", help="completions, results and plots; resumed")
    parser.add_argument(
        "--update-cards", action="store_true", help="write results and verdict into the cards of local adapters"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints tables and verdicts, writes files; returns the lines of `results.jsonl`."""
    from transformers import logging

    from ..engines.by_name import build_engine
    from ..evaluation import evaluate_decoding

    logging.set_verbosity_error()
    adapters, rivals = _by_name(args.adapter), _by_name(args.rival)
    model, tokenizer = load_for_adapters(
        args, [one for group in (adapters, rivals) for folders in group.values() for one in folders]
    )
    with build_engine(args.engine, model, tokenizer, batch_rows=args.batch_rows, **args.engine_options) as engine:
        found = evaluate_decoding(
            model,
            tokenizer,
            load_tasks(args),
            adapters,
            baselines=[*baselines_of(args.baselines), *map(_static, args.static)],
            rivals=rivals,
            samples=args.samples,
            ks=args.k,
            token_budgets=args.token_budget,
            seeds=args.seeds,
            folder=args.output,
            batch_rows=args.batch_rows,
            engine=engine,
        )
    files = [str(Path(args.output, name)) for name in ("completions.jsonl", "results.jsonl")]
    files += write_gains(found.measures, Path(args.output)) if has_pictures() else []
    files += _write_statics(found.verdicts, model, Path(args.output))
    if args.update_cards:
        update_cards(found, adapters)
    print(f"\nIn per cent with 95 % intervals over problems; gains are paired by problem.\n\n{found.table()}")
    for reason in dict.fromkeys(line["engine_refused"] for line in found.measures if "engine_refused" in line):
        print(f"\nRun in transformers: {reason}")
    if found.verdicts:
        print(f"\n{found.summary()}")
    print(f"\nWritten: {', '.join(files)}")
    return {"lines": found.lines, "files": files}


def _static(text: str) -> Any:
    from ..evaluation.controls import static

    settings = static_settings(text, "--static")
    if settings is None:
        raise ValueError(f"--static {text} is no setting; it has to be such as T=0.7,top_p=0.9, greedy or default.")
    return static(settings)


def _by_name(given: Sequence[str]) -> dict[str, list[str]]:
    """Folders by name; without one, the last part of the folder is it."""
    found: dict[str, list[str]] = {}
    for one in given:
        name, mark, folder = one.partition("=")
        if not mark:
            name, folder = Path(one).name, one
        if not name or not folder:
            raise ValueError(f"{one!r} has to be a folder or Hub id of an adapter, or NAME=FOLDER.")
        found.setdefault(name, []).append(folder)
    return found


def _write_statics(verdicts: Sequence[dict[str, Any]], model: Any, folder: Path) -> list[str]:
    """The settings that do as well as an adapter, as generation configs to use instead."""
    from ..hub.static_setting import SPECIAL_TOKENS, write_static_generation_config

    tokens = {name: vars(model.generation_config).get(name) for name in SPECIAL_TOKENS}
    written = []
    for line in verdicts:
        if line["static"] is not None:
            budgets = "+".join(map(str, line["token_budgets"]))
            name = re.sub(r"[^\w.+-]+", "-", f"{line['adapter']}-{line['task']}-{budgets}-pass{line['k']}")
            written.append(str(write_static_generation_config(folder / name, line["static"], tokens)))
    return written
