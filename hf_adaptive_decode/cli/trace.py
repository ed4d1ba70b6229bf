"""`hf-adaptive-decode trace`: pages that show what each token was decoded with; knows nothing of how they look."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..evaluation.provenance import environment
from .adapters import load_for_adapters, static_settings
from .tasks import add_task_arguments, asked, count, load_problems, positive, reward_function

_TOKENS_FILE = "tokens.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What decodes what, and where the pages go."""
    parser.add_argument("--output", default="trace_output", metavar="DIR", help="where the pages go")
    parser.add_argument(
        "--adapter", metavar="FOLDER_OR_ID", help="the adapter that decodes, by default its own base model"
    )
    parser.add_argument(
        "--versus",
        metavar="DECODER",
        help="a second decoder beside it: `greedy`, `default` (T=1), settings as in `T=0.7,top_p=0.9` (also top_k and "
        "min_p), or another adapter of the same base model; without --adapter the only one",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="what to complete, instead of a problem of --dataset")
    what.add_argument("--problem", type=count, default=0, metavar="N", help="which problem of the split, from 0")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"], help="of --dataset")
    parser.add_argument(
        "--chat", action="store_true", help="ask a plain prompt as a user's message, through the model's chat template"
    )
    parser.add_argument("--token-budget", type=positive, default=48, help="new tokens of each completion")
    parser.add_argument("--samples", type=positive, default=1, help="completions by each decoder, one page each")
    parser.add_argument("--parallel-budget", type=positive, help="B that a policy is told; as many as --samples")
    parser.add_argument("--top", type=positive, default=5, help="how many of the likeliest tokens to show")
    parser.add_argument("--save", action="store_true", help=f"also write every token to DIR/{_TOKENS_FILE}")
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of problems and the sampling")
    add_task_arguments(parser)
    # So that an adapter's own base model is told from one that was asked for.
    parser.set_defaults(model=None)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes, measures and writes; returns the files and what is on them as numbers."""
    from transformers import logging

    started = time.perf_counter()
    logging.set_verbosity_error()
    # None for those that are adapters.
    decoders = {} if args.adapter is None else {args.adapter: None}
    decoders |= {} if args.versus is None else {args.versus: static_settings(args.versus, "--versus")}
    if not decoders:
        raise ValueError(
            "there is nothing to trace: pass --adapter with an adapter's folder or Hub id, or --versus alone (greedy, "
            "default, settings such as T=0.7,top_p=0.9) for the base model's own decoding. `hf-adaptive-decode demo` "
            "trains an adapter within minutes."
        )
    row = _problem(args)
    reward = None if args.prompt is not None else reward_function(args.reward)
    adapters = [name for name, settings in decoders.items() if settings is None]
    model, tokenizer = load_for_adapters(args, adapters)
    if args.chat and not tokenizer.chat_template:
        raise ValueError("--chat needs a chat template, and the model's tokenizer has none; leave it out.")
    traces = [_traces(args, model, tokenizer, row, reward, *decoder) for decoder in decoders.items()]
    files = _write(args, traces)
    print("\n".join(files))
    return {
        "files": files,
        "prompt": traces[0][0].prompt,
        "decoders": [_summary(group) for group in traces],
        "arguments": asked(args),
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }


def _problem(args: argparse.Namespace) -> dict[str, Any]:
    """The row with the prompt, and with the reward's columns if it is a data set's."""
    if args.prompt is None:
        rows = load_problems(args, args.split, args.problem + 1, args.seed, chat=args.chat)
        return dict(rows[args.problem])
    return {"prompt": [{"role": "user", "content": args.prompt}] if args.chat else args.prompt}


def _traces(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    row: dict[str, Any],
    reward: Any,
    name: str,
    settings: dict[str, float] | None,
) -> list[Any]:
    """A trace of each completion by one decoder: static settings, or else the adapter of that name."""
    from ..evaluation.runner import Decoder
    from ..evaluation.traces import trace_problem
    from ..hub.store import load_adapter

    decoder = Decoder(name, settings, load_adapter(name, model) if settings is None else None)
    how: dict[str, Any] = {"samples": args.samples, "parallel_budget": args.parallel_budget, "top": args.top}
    how |= {"token_budget": args.token_budget, "seed": args.seed}
    return trace_problem(model, tokenizer, row, reward, decoder, **how)


def _write(args: argparse.Namespace, traces: list[list[Any]]) -> list[str]:
    """A page for each sample, and the table if asked for; returns their paths."""
    from ..reports.trace_page import trace_page

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, side_by_side in enumerate(zip(*traces, strict=True)):
        note = f"Sample {number} of {args.samples}, seed {args.seed}, token budget {args.token_budget}"
        path = folder / f"trace-{number}.html"
        path.write_text(trace_page(side_by_side, title="Decoding trace", note=note), encoding="utf-8")
        files.append(str(path))
    if args.save:
        path = folder / _TOKENS_FILE
        with path.open("w", encoding="utf-8") as file:
            for group in traces:
                for sample, trace in enumerate(group):
                    file.writelines(json.dumps({"sample": sample, **one}) + "\n" for one in trace.rows())
        files.append(str(path))
    return files


def _summary(traces: list[Any]) -> dict[str, Any]:
    return {
        "name": traces[0].name,
        "tokens": [len(trace.tokens) for trace in traces],
        "ended": [trace.ended for trace in traces],
        "rewards": [trace.reward for trace in traces],
        "texts": ["".join(token.text for token in trace.tokens) for trace in traces],
    }
