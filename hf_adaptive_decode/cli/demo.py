"""`hf-adaptive-decode demo`: heads on the embedded model, from training to a reloaded adapter; knows the testbed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..evaluation.provenance import environment
from .comparison import update_cards
from .heads_run import SHOWN, heads_arguments, heads_trainer, solutions
from .pictures import write_gains, write_trace
from .run_folder import RunFolder, train_in
from .tasks import asked, positive

_NAME = "learned heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes and seeds; the defaults finish within minutes on two cores."""
    parser.add_argument("--output", default="demo_output", metavar="DIR", help="where the adapter goes")
    parser.add_argument("--seed", type=int, default=0, help="seeds data, training and sampling")
    parser.add_argument(
        "--train-problems", type=positive, default=1500, help="problems to sample training solutions of"
    )
    parser.add_argument("--validation-problems", type=positive, default=200, help="problems to choose baselines on")
    parser.add_argument("--test-problems", type=positive, default=600, help="held-out problems to report on")
    parser.add_argument("--samples", type=positive, default=8, help="completions of each problem")
    parser.add_argument("--token-budget", type=positive, default=48, help="new tokens of each completion")
    parser.add_argument("--steps", type=positive, default=300, help="training steps")
    # Both chosen on validation problems: here the paper's weighting holds the heads back at the forks.
    parser.add_argument("--dft-weight", default="off", choices=["off", "base", "scaled"], help="paper: base")
    parser.add_argument("--easy-token-mask-ratio", type=float, default=0.6, help="paper: 0.6")
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads; the embedded model is too small for more"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, saves, evaluates, reloads and shows; returns what it printed as numbers."""
    import torch
    from transformers import logging

    from ..evaluation import STANDARD, evaluate_decoding, load_task

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    output = Path(args.output)
    model, tokenizer, log = _train(args)
    found = evaluate_decoding(
        model,
        tokenizer,
        load_task("testbed", validation=args.validation_problems, test=args.test_problems, seed=args.seed),
        {_NAME: model.decoding_adapter},
        baselines=(*STANDARD, "shuffle", "shuffle_in_bins", "oracle_static"),
        samples=args.samples,
        token_budgets=args.token_budget,
        seeds=(args.seed,),
        folder=output / "evaluation",
        batch_rows=1024,
    )
    update_cards(found, {_NAME: [output / "adapter"]})
    shown, files = _show_reloaded(model, args)
    files += _pictures(found, log, output)
    size = f"{args.test_problems} test problems, {args.samples} samples each, token budget {args.token_budget}"
    print(f"\n{size};\nin per cent with 95 % intervals over problems; gains are paired by problem:\n")
    print(found.table())
    print(f"\nOne problem, decoded by the adapter loaded again from {output / 'adapter'}:\n\n{shown}")
    print(f"\nVerdict:\n{found.summary()}")
    print(f"\nSee {', '.join(files)}")
    seconds = time.perf_counter() - started
    line = f"AutoDecoForCausalLM.from_pretrained({str(output / 'adapter')!r})"
    print(f"\nLoad it in one line: {line}   [{seconds:.0f} s]")
    return {"lines": found.lines, "arguments": asked(args), "seconds": seconds, "environment": environment()}


def _pictures(found: Any, log: list[dict[str, Any]], output: Path) -> list[str]:
    """The gains and the training as pictures."""
    from ..reports.plots import plot_training_curves

    plot_training_curves({"heads": log}, output / "training.png")
    return [*write_gains(found.measures, output), str(output / "training.png")]


def _train(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Samples verified solutions from the base model, trains a fresh adapter on them and saves it; returns the log."""
    from ..testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

    base, tokenizer = load_base_model(), load_tokenizer()
    problems = build_problems("train", args.train_problems, seed=args.seed)
    how = {"token_budget": args.token_budget, "seed": args.seed, "batch_rows": 1024}
    rows = solutions(None, base, tokenizer, problems, testbed_reward, **how)
    arguments = heads_arguments(
        Path(args.output, "training"),
        max_steps=args.steps,
        dft_weight=args.dft_weight,
        easy_token_mask_ratio=args.easy_token_mask_ratio,
        use_cpu=True,
        seed=args.seed,
    )

    def make_trainer() -> Any:
        trainer = heads_trainer(base, tokenizer, rows, arguments)
        trainer.model.print_trainable_parameters()
        return trainer

    run_folder = RunFolder(Path(args.output), asked(args), resume=False)
    train_in(run_folder, base, make_trainer, shown=SHOWN)
    return base, tokenizer, run_folder.record["log"]


def _show_reloaded(model: Any, args: argparse.Namespace) -> tuple[str, list[str]]:
    """
    Reloads the adapter, checks that it decodes as before, and shows one completion: as lines, and beside plain sampling
    on a page.
    """
    from ..evaluation.runner import DEFAULT, Decoder
    from ..evaluation.traces import trace_problem
    from ..modeling import AutoDecoForCausalLM
    from ..testbed import build_problems, load_tokenizer, testbed_reward

    tokenizer = load_tokenizer()
    (row,) = build_problems("test", 4, types=["coin"], seed=args.seed)[-1:]
    reloaded = AutoDecoForCausalLM.from_pretrained(Path(args.output, "adapter"))
    how: dict[str, Any] = {"token_budget": args.token_budget, "seed": args.seed}
    before, after = (
        trace_problem(one, tokenizer, row, testbed_reward, Decoder(_NAME, policy=one.decoding_adapter), **how)[0]
        for one in (model, reloaded)
    )
    if before != after:
        raise RuntimeError(f"the adapter in {args.output} decodes otherwise than the one that was saved.")
    plain = trace_problem(reloaded, tokenizer, row, testbed_reward, DEFAULT, **how)[0]
    note = f"Seed {args.seed}, token budget {args.token_budget}"
    files = write_trace([after, plain], Path(args.output), note)
    lines = [f"  {row['prompt']}", f"  {'token':>8}  {'T':>5}  {'P':>5}"]
    for token in after.tokens:
        temperature, top_p = token.temperature or 0.0, token.top_p or 0.0
        lines.append(f"  {token.text.strip():>8}  {temperature:5.2f}  {top_p:5.2f}  {'#' * round(20 * temperature)}")
    return "\n".join(lines), files
