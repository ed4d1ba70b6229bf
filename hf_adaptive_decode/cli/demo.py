"""`hf-adaptive-decode demo`: heads on the embedded model, from training to a reloaded adapter; knows the testbed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .env import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes and seeds; the defaults finish within minutes on two cores."""
    parser.add_argument("--output", default="demo_output", metavar="DIR", help="where the adapter goes")
    parser.add_argument("--seed", type=int, default=0, help="seeds data, training and sampling")
    parser.add_argument("--train-problems", type=int, default=1500, help="problems to sample training solutions of")
    parser.add_argument("--validation-problems", type=int, default=200, help="problems to choose baselines on")
    parser.add_argument("--test-problems", type=int, default=600, help="held-out problems to report on")
    parser.add_argument("--samples", type=int, default=8, help="completions of each problem")
    parser.add_argument("--token-budget", type=int, default=48, help="new tokens of each completion")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    # Both chosen on validation problems: here the paper's weighting holds the heads back at the forks.
    parser.add_argument("--dft-weight", default="off", choices=["off", "base", "scaled"], help="paper: base")
    parser.add_argument("--easy-token-mask-ratio", type=float, default=0.6, help="paper: 0.6")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the embedded model is too small for more")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, compares, saves, reloads and shows; returns what it printed as numbers."""
    import torch
    from transformers import logging

    from ..evaluation import compare_with_baselines, comparison_table
    from ..testbed import build_problems, testbed_reward

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    model, tokenizer = _train(args)
    comparison = compare_with_baselines(
        model,
        tokenizer,
        build_problems("validation", args.validation_problems, seed=args.seed),
        build_problems("test", args.test_problems, seed=args.seed),
        testbed_reward,
        ks=tuple(sorted({1, args.samples})),
        samples=args.samples,
        token_budget=args.token_budget,
        seed=args.seed,
        batch_rows=1024,
    )
    result = comparison.as_dict()
    adapter = Path(args.output, "adapter")
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    shown = _show_reloaded(model, adapter, args)
    say = sys.stderr if args.json == "-" else sys.stdout
    size = f"{args.test_problems} test problems, {args.samples} samples each, token budget {args.token_budget}"
    print(f"\n{size};\nin per cent with 95 % intervals over problems; gains are paired by problem:\n", file=say)
    print(comparison_table(result), file=say)
    print(f"\nOne problem, decoded by the adapter loaded again from {adapter}:\n\n{shown}", file=say)
    seconds = time.perf_counter() - started
    print(f"\nLoad it in one line: AutoDecoForCausalLM.from_pretrained({str(adapter)!r})   [{seconds:.0f} s]", file=say)
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "json", "config")}
    return {**result, "arguments": settings, "seconds": seconds, "environment": environment()}


def _train(args: argparse.Namespace) -> tuple[Any, Any]:
    """Samples verified solutions from the base model and trains a fresh adapter on them."""
    import torch

    from ..configuration import AutoDecoConfig
    from ..modeling import AutoDecoForCausalLM
    from ..testbed import build_problems, load_base_model, load_tokenizer, testbed_reward
    from ..training import AutoDecoTrainer, AutoDecoTrainingArguments
    from ..training.rejection import verified_completions

    base, tokenizer = load_base_model(), load_tokenizer()
    rows = verified_completions(
        base,
        tokenizer,
        build_problems("train", args.train_problems, seed=args.seed),
        testbed_reward,
        token_budget=args.token_budget,
        seed=args.seed,
        batch_rows=1024,
    )
    torch.manual_seed(args.seed)  # for the fresh heads; the Trainer seeds what follows
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="heads"))
    model.print_trainable_parameters()
    arguments = AutoDecoTrainingArguments(
        output_dir=str(Path(args.output, "training")),
        per_device_train_batch_size=64,
        max_steps=args.steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=max(1, args.steps // 5),
        save_strategy="no",
        report_to="none",
        dft_weight=args.dft_weight,
        easy_token_mask_ratio=args.easy_token_mask_ratio,
        use_cpu=True,
        seed=args.seed,
    )
    AutoDecoTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    model.eval()
    return model, tokenizer


def _show_reloaded(model: Any, adapter: Path, args: argparse.Namespace) -> str:
    """Reloads the adapter, checks that it decodes as before, and lists one completion's tokens with their T and P."""
    import torch

    from ..modeling import AutoDecoForCausalLM
    from ..testbed import build_problems, load_tokenizer

    tokenizer = load_tokenizer()
    prompt = build_problems("test", 4, types=["coin"], seed=args.seed)[-1]["prompt"]
    inputs = tokenizer(prompt, return_tensors="pt")
    reloaded = AutoDecoForCausalLM.from_pretrained(adapter)
    outputs = []
    for one in (model, reloaded):
        torch.manual_seed(args.seed)
        how: dict[str, Any] = {"return_dict_in_generate": True, "output_decoding_trace": True}
        outputs.append(one.generate(**inputs, budget=args.token_budget, **how))
    if not torch.equal(outputs[0].sequences, outputs[1].sequences):
        raise RuntimeError(f"the adapter in {adapter} decodes otherwise than the one that was saved.")
    trace = outputs[1].decoding_trace
    tokens = outputs[1].sequences[0, inputs["input_ids"].shape[1] :].tolist()
    lines = [f"  {prompt}", f"  {'token':>8}  {'T':>5}  {'P':>5}"]
    for token, temperature, top_p in zip(tokens, trace.temperature[0], trace.top_p[0], strict=True):
        bar = "#" * round(20 * float(temperature))
        lines.append(f"  {tokenizer.decode([token]):>8}  {float(temperature):5.2f}  {float(top_p):5.2f}  {bar}")
    return "\n".join(lines)
