"""`hf-adaptive-decode sample`: a model's own verified solutions as a data set to train heads on; knows no trainer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.provenance import environment, provenance, without_folders
from .adapters import static_settings
from .config_file import UsageError
from .engine_flags import add_engine_argument
from .sample_folder import CARD_FILE, COMPLETIONS_FILE, may_write_card, refuse_foreign, training_rows, write_folder
from .tasks import add_model_arguments, asked, check_chat, load_model, positive
from .training_tasks import add_training_task_arguments, training_problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the problems, how to sample and what to keep; the defaults are for the embedded model."""
    parser.add_argument(
        "--output", default="sampled", metavar="DIR", help="for DIR/train.jsonl with its card and provenance; resumed"
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of problems and the sampling")
    add_model_arguments(parser)
    add_training_task_arguments(parser.add_argument_group("problems"))
    group = parser.add_argument_group(
        "sampling", "Of each problem completions are sampled, scored by its reward, and kept if right (AutoDeco, 3.1)."
    )
    group.add_argument("--samples", type=positive, metavar="N", default=4, help="completions of a problem")
    group.add_argument(
        "--sampling",
        nargs="+",
        type=_settings,
        metavar="SETTINGS",
        default=["greedy", "T=0.7", "T=1"],
        help="what with: T=0.7,top_p=0.9 (also top_k and min_p), greedy or default. Of several, from cold to hot, a "
        "problem goes on to the next only if none of its completions was right: by default greedy T=0.7 T=1",
    )
    group.add_argument("--token-budget", type=positive, metavar="N", default=48, help="most new tokens of a completion")
    group.add_argument("--batch-rows", type=positive, metavar="N", default=256, help="completions decoded at once")
    add_engine_argument(group)
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take from --output what was sampled there before; --no-resume deletes that and starts over",
    )
    group = parser.add_argument_group("choice")
    group.add_argument("--keep", type=positive, metavar="N", default=2, help="most right completions of a problem")
    group.add_argument(
        "--solve-rate",
        nargs=2,
        type=_part,
        metavar=("LOW", "HIGH"),
        help="keep only problems of which this part of the completions is right: 0 0.9 leaves out those always solved",
    )
    group.add_argument(
        "--token-ids",
        action="store_true",
        help="also write `input_ids` and `labels`, which train-heads then takes: the very tokens that were sampled",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, verifies, chooses and writes; returns the numbers."""
    from transformers import logging

    from ..actions import describe
    from ..training.selection import select

    started = time.perf_counter()
    logging.set_verbosity_error()
    # argparse leaves a default that is a list as it is.
    ladder = args.sampling = [_settings(one) if isinstance(one, str) else one for one in args.sampling]
    _check(args, ladder)
    refuse_foreign(Path(args.output))
    source, problems, reward = training_problems(args)
    _check_columns(problems)
    model, tokenizer = load_model(args)
    check_chat(args, tokenizer)
    store, drawn = _draw(args, model, tokenizer, problems, reward, ladder)
    selection = select(drawn, len(ladder), args.keep, None if args.solve_rate is None else tuple(args.solve_rate))
    if not selection.kept:
        raise ValueError(_nothing(selection.counts, args))
    by_setting = [
        {"name": describe(settings), "sampling": settings, **counts}
        for settings, counts in zip(ladder, selection.by_rung, strict=True)
    ]
    facts = _provenance(args, model, source, reward, selection.counts, by_setting)
    rows = training_rows(selection, store, problems, ladder, tokenizer if args.token_ids else None)
    keeps_card = not may_write_card(Path(args.output))
    files = write_folder(Path(args.output), rows, facts)
    print(_report(selection.counts, by_setting))
    if keeps_card:
        print(f"\n{CARD_FILE} was changed by hand and stays as it is: its numbers may be those of an earlier run.")
    print(f"\nWritten: {', '.join(files)}\nTrain on it: train-heads --dataset {files[0]} --no-hold-out")
    result = {"counts": selection.counts, "by_setting": by_setting, "files": files, "arguments": asked(args)}
    return {**result, "seconds": time.perf_counter() - started, "environment": environment()}


def _settings(text: str) -> dict[str, float]:
    """A static setting, for argparse."""
    try:
        found = static_settings(text, "it is")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; it has to be such as T=0.7,top_p=0.9, or greedy")
    return found


def _part(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return number


def _check(args: argparse.Namespace, ladder: Sequence[dict[str, float]]) -> None:
    if args.solve_rate is not None:
        low, high = args.solve_rate
        if low > high or high == 0:
            raise UsageError(
                f"--solve-rate is {low:g} {high:g}: nothing would be kept; pass the lowest part and then the highest, "
                "which is above 0."
            )
    most = max(1 if settings.get("temperature") == 0 else args.samples for settings in ladder)
    if args.keep > most:
        raise UsageError(f"--keep is {args.keep}, and no problem has more than {most} completions; raise --samples.")


def _check_columns(problems: Sequence[dict[str, Any]]) -> None:
    """Refuses columns that hold texts here and lists there, which no reader of data sets takes."""
    for name in problems[0]:
        kinds = sorted({type(row[name]).__name__ for row in problems if row.get(name) is not None})
        if len(kinds) > 1:
            raise ValueError(
                f"the column `{name}` of the problems holds values of several types ({', '.join(kinds)}), and a data "
                "set has one; sample their sources one by one."
            )


def _draw(
    args: argparse.Namespace, model: Any, tokenizer: Any, problems: Any, reward: Any, ladder: Any
) -> tuple[Any, Any]:
    from ..engines.by_name import build_engine
    from ..evaluation.store import CompletionStore
    from ..training.rejection import draw_solutions

    path = Path(args.output, COMPLETIONS_FILE)
    if not args.resume:
        path.unlink(missing_ok=True)
    store = CompletionStore(path)
    how = {"samples": args.samples, "token_budget": args.token_budget, "seed": args.seed}
    with build_engine(args.engine, model, tokenizer, batch_rows=args.batch_rows, **args.engine_options) as engine:
        return store, draw_solutions(engine, problems, reward, ladder=ladder, store=store, **how)


def _nothing(counts: dict[str, int], args: argparse.Namespace) -> str:
    begin = f"none of {counts['problems']} problems has a completion to keep"
    if counts["outside_solve_rate"]:
        return f"{begin}: {counts['outside_solve_rate']} were solved, and all lie outside of --solve-rate; widen that."
    cut = f" ({counts['truncated']} of {counts['sampled']} completions were cut off)" if counts["truncated"] else ""
    return (
        f"{begin} within {args.token_budget} tokens{cut}; check the reward and how problems are asked, or raise "
        "--token-budget or --samples."
    )


def _provenance(
    args: argparse.Namespace, model: Any, source: str, reward: Any, counts: dict[str, int], by_setting: Any
) -> dict[str, Any]:
    from ..hub.bases import base_name

    own = ("engine", "seed", "samples", "token_budget", "keep", "solve_rate", "token_ids", "chat", "prompt_template")
    return provenance(
        model=without_folders(str(base_name(model))),
        model_revision=getattr(model.config, "_commit_hash", None),
        source=source,
        split="train",
        reward=reward.__name__,
        by_setting=by_setting,
        counts=counts,
        **{name: vars(args)[name] for name in own},
    )


def _report(counts: dict[str, int], by_setting: Sequence[dict[str, Any]]) -> str:
    from ..evaluation.table import markdown_table
    from ..hub.dataset_card import settings_table

    return f"{markdown_table(*settings_table(by_setting))}\n\n" + (
        f"{counts['solved']:,} of {counts['problems']:,} problems were solved, {counts['solved_always']:,} by every "
        f"completion; {counts['outside_solve_rate']:,} left out by --solve-rate. "
        f"{counts['truncated']:,} completions were cut off, {counts['duplicates']:,} were right and repeated."
    )
