"""
Trains a policy that chooses sampling parameters for each programming problem, told how many programs it may write.

    python examples/train_policy_on_code.py problems.jsonl --model Qwen/Qwen3-0.6B --budget 512

Each line of the file has a `prompt` and `tests`: Python with asserts, or a list of `{"input": ..., "output": ...}`. A
program is right if it passes all of them. It is split three ways: to train on, to choose baselines on, and to report
on. Programs run in a sandbox; without one that works, nothing is run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.actions import ACTION_PRESETS
from hf_adaptive_decode.evaluation import Task, evaluate_decoding
from hf_adaptive_decode.rewards import SandboxUnavailableError, code_reward

PARALLEL = [1, 4]


def read_problems(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with a `prompt` and the `tests`, which `code_reward` runs."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    # A repeated prompt counts once, so that none is met again in another part.
    unique = {row["prompt"]: {"prompt": row["prompt"], "tests": row["tests"]} for row in rows}
    problems: list[dict[str, Any]] = list(unique.values())
    for problem in problems if tokenizer.chat_template else ():
        problem["prompt"] = [{"role": "user", "content": problem["prompt"]}]
    return problems


def train(
    base: Any, tokenizer: Any, problems: list[dict[str, Any]], options: argparse.Namespace
) -> AutoDecoForCausalLM:
    """The base with a trained policy, which is also saved."""
    torch.manual_seed(options.seed)
    config = AutoDecoConfig(
        policy="sequence_actions", actions=ACTION_PRESETS["code"], max_parallel_budget=max(PARALLEL)
    )
    args = REINFORCEDecodingTrainingArguments(
        output_dir=str(options.output / "training"),
        max_steps=options.steps,
        per_device_train_batch_size=options.prompts_per_step,
        num_generations=8,
        budget=options.budget,
        parallel_budget=PARALLEL,
        reward_aggregation="pass@B",
        rollout_batch_rows=128,
        save_steps=20,
        save_total_limit=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    model = AutoDecoForCausalLM.from_base(base, config)
    REINFORCEDecodingTrainer(model, code_reward, args, problems, processing_class=tokenizer).train()
    model.save_pretrained(options.output / "adapter")
    tokenizer.save_pretrained(options.output / "adapter")
    return model


def report(model: Any, tokenizer: Any, validation: list[Any], test: list[Any], options: argparse.Namespace) -> str:
    """The policy beside what is cheaper, as a table, and whether it helps."""
    found = evaluate_decoding(
        model.eval(),
        tokenizer,
        Task("code", validation, test, code_reward),
        {"learned prompt policy": model.decoding_adapter},
        samples=max(PARALLEL),
        ks=PARALLEL,
        token_budgets=options.budget,
        seeds=(options.seed,),
        grid=ACTION_PRESETS["code"],
        folder=options.output / "evaluation",
        batch_rows=128,
    )
    title = f"{len(test)} problems, per cent with 95 % intervals"
    return f"\n{title}:\n\n{found.table()}\n\n{found.summary()}"


def main() -> None:
    """Trains, saves, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder")
    parser.add_argument("--budget", type=int, default=512, help="new tokens of each completion")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument(
        "--held-out", type=int, default=100, help="problems to report on; half as many choose baselines"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("code_policy"))
    options = parser.parse_args()
    try:
        code_reward(completions=[], tests=[])
    except SandboxUnavailableError as error:
        sys.exit(f"no sandbox to run programs in: {error}")

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model).eval()
    except (OSError, ValueError) as error:
        parser.error(f"--model {options.model} cannot be loaded: {error}")
    try:
        problems = read_problems(options.data, tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{options.data} has to hold lines with a `prompt` and `tests`: {error!r}")
    random.Random(options.seed).shuffle(problems)
    ends = [options.held_out, options.held_out + max(1, options.held_out // 2)]
    if not 0 < ends[0] < ends[1] < len(problems):
        parser.error(f"--held-out is {ends[0]} of {len(problems)} problems; pass 1 to {(len(problems) - 1) * 2 // 3}.")
    model = train(base, tokenizer, problems[ends[1] :], options)
    print(report(model, tokenizer, problems[ends[0] : ends[1]], problems[: ends[0]], options))
    print(f"\nLoad it in one line: AutoDecoForCausalLM.from_pretrained({str(options.output / 'adapter')!r})")


if __name__ == "__main__":
    main()
