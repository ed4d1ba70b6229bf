"""
Commands such as "be calm" or "be diverse" in a prompt, and what decoding heads make of them (AutoDeco, section 3.3).

    python examples/language_control.py --json result.json

Trains a base model that knows such commands (two to four minutes on one CPU thread, or `--base DIR` from
`python -m hf_adaptive_decode.testbed.commands --output DIR`), then heads on prompts without commands, as usual. Do they
heed commands by themselves? Then the heads are trained on with the ranking loss, and the same is measured again, with
test prompts and command words that the heads have not been trained on. A third run trains on for as many steps without
the ranking loss: what it changes, more training would have changed too.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, AutoDecoTrainer, AutoDecoTrainingArguments
from hf_adaptive_decode.cli.env import environment
from hf_adaptive_decode.evaluation.control_table import control_table, measure_control
from hf_adaptive_decode.evaluation.metrics import bootstrap_interval
from hf_adaptive_decode.evaluation.runner import Decoder, run_decoder
from hf_adaptive_decode.evaluation.table import format_interval
from hf_adaptive_decode.testbed import build_problems
from hf_adaptive_decode.testbed.commands import (
    COMMANDS,
    STEPS,
    build_command_base,
    build_command_problems,
    command_reward,
    entropy_under_commands,
)
from hf_adaptive_decode.training.control import CommandSet
from hf_adaptive_decode.training.rejection import verified_completions

STAGES = ("before targeted training", "after as many steps without commands", "after targeted training")


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int, seed: int, **settings: Any) -> None:
    """Trains the model's heads; without `settings` on prompts without commands."""
    with tempfile.TemporaryDirectory() as folder:
        args = AutoDecoTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=64,
            max_steps=steps,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps),
            dft_weight="off",
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=seed,
            **settings,
        )
        AutoDecoTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    model.eval()


def training_rows(base: Any, tokenizer: Any, problems: int, token_budget: int, seed: int) -> list[dict[str, Any]]:
    """Verified solutions of the base model, with the text of their prompts."""
    rows: list[dict[str, Any]] = verified_completions(
        base,
        tokenizer,
        build_problems("train", problems),
        command_reward,
        token_budget=token_budget,
        seed=seed,
        batch_rows=1024,
    )
    for row in rows:
        prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        row["prompt"] = tokenizer.decode(prompt)
    return rows


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Table 4 on test prompts by held-out command, and how often answers are right with and without commands."""
    prompts = [row["prompt"] for row in build_problems("test", options.prompts)]
    how = {"token_budget": options.token_budget, "samples": options.samples, "seed": 0, "batch_rows": 1024}
    held_out = CommandSet(**COMMANDS["held_out"])
    control, rates = measure_control(model, tokenizer, prompts, held_out, **how), {}
    for name in ("none", "low", "high"):
        size = ("test", options.reward_prompts)
        problems = build_problems(*size) if name == "none" else build_command_problems(*size, name)
        outcome = run_decoder(model, tokenizer, problems, command_reward, Decoder(name), **how, show_progress=False)
        rates[name] = vars(bootstrap_interval(outcome.pass_at(1)))
    return {"control": control, "pass@1": rates}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and measures with every seed, and prints the tables of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a base model that knows commands, instead of training one")
    parser.add_argument("--base-seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the heads' training")
    parser.add_argument("--train-problems", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300, help="of the heads' first training, without commands")
    parser.add_argument("--control-steps", type=int, default=200, help="of the targeted training")
    parser.add_argument("--weight", type=float, default=2.0, help="of the ranking loss")
    parser.add_argument("--temperature-margin", type=float, default=0.1)
    parser.add_argument("--top-p-margin", type=float, default=0.02)
    parser.add_argument("--control-learning-rate", type=float, default=3e-3)
    parser.add_argument("--prompts", type=int, default=100, help="test prompts to measure commands on")
    parser.add_argument("--reward-prompts", type=int, default=400, help="test prompts to measure right answers on")
    parser.add_argument("--samples", type=int, default=4, help="completions of each")
    parser.add_argument("--token-budget", type=int, default=48, help="new tokens of each completion")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    started = time.process_time()
    if options.base is None:
        base, tokenizer = build_command_base(options.base_seed, options.base_steps, progress=True)
    else:
        base, tokenizer = (kind.from_pretrained(options.base) for kind in (AutoModelForCausalLM, AutoTokenizer))
    base.eval()
    base_seconds = time.process_time() - started
    entropies = {words: entropy_under_commands(base, tokenizer, words=words) for words in COMMANDS}
    targeted = {
        "control_loss_weight": options.weight,
        "control_temperature_margin": options.temperature_margin,
        "control_top_p_margin": options.top_p_margin,
        "control_commands": COMMANDS["train"],
    }
    runs = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = AutoDecoForCausalLM.from_base(copy.deepcopy(base), AutoDecoConfig())
        rows = training_rows(base, tokenizer, options.train_problems, options.token_budget, seed)
        train(model, tokenizer, rows, options.steps, seed, learning_rate=3e-3)
        run = {"seed": seed, "rows": len(rows), STAGES[0]: measure(model, tokenizer, options)}
        trained = copy.deepcopy(model.decoding_adapter.state_dict())
        for name, settings in zip(STAGES[1:], ({}, targeted), strict=True):
            model.decoding_adapter.load_state_dict(trained)
            rate = options.control_learning_rate
            train(model, tokenizer, rows, options.control_steps, seed, learning_rate=rate, **settings)
            run[name] = measure(model, tokenizer, options)
        runs.append(run)
    for name in STAGES:
        found = runs[0][name]
        print(
            f"\n{name}, seed {options.seeds[0]}, {options.prompts} test prompts:\n\n{control_table(found['control'])}\n"
        )
        print("pass@1 by command:", *(f"{k} {format_interval(rate)}" for k, rate in found["pass@1"].items()))
    if options.json is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "base")}
        result = {
            "settings": {**settings, "base": "built here" if options.base is None else options.base.name},
            "commands": COMMANDS,
            "entropy of the base by command, nats": entropies,
            "runs": runs,
            "cpu_seconds": {"base": base_seconds, "all": time.process_time() - started},
            "environment": environment(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
