"""
Trains a policy that chooses a temperature for each token on GSM8K, and compares it with everything that is cheaper.

    python examples/train_policy_on_gsm8k.py train.jsonl --model Qwen/Qwen3-0.6B --budget 512

The file has GSM8K's format: rows with a `question` and an `answer` that ends in `#### 42`. It is split three ways: to
train on, to choose baselines on, and to report on.
"""

from __future__ import annotations

import argparse
import json
import random
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
from hf_adaptive_decode.evaluation.tasks import read_math_answer
from hf_adaptive_decode.rewards import math_reward


def read_problems(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with a `prompt` and the `solution`, which `math_reward` reads."""
    problems = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            prompt: Any = f"{row['question']}\nPut the final answer within \\boxed{{}}."
            if tokenizer.chat_template:
                prompt = [{"role": "user", "content": prompt}]
            # A repeated question counts once, so that none is met again in another part.
            problems[row["question"]] = {"prompt": prompt, "solution": row["answer"].rpartition("####")[2].strip()}
    return list(problems.values())


def train(
    base: Any, tokenizer: Any, problems: list[dict[str, Any]], options: argparse.Namespace
) -> AutoDecoForCausalLM:
    """The base with a trained policy, which is also saved."""
    torch.manual_seed(options.seed)
    config = AutoDecoConfig(
        policy="token_actions", actions=ACTION_PRESETS["token_math"], max_token_budget=max(2, options.budget)
    )
    args = REINFORCEDecodingTrainingArguments(
        output_dir=str(options.output / "training"),
        max_steps=options.steps,
        per_device_train_batch_size=options.prompts_per_step,
        num_generations=8,
        budget=options.budget,
        rollout_batch_rows=128,
        save_steps=20,
        save_total_limit=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    model = AutoDecoForCausalLM.from_base(base, config)
    REINFORCEDecodingTrainer(model, math_reward, args, problems, processing_class=tokenizer).train()
    model.save_pretrained(options.output / "adapter")
    tokenizer.save_pretrained(options.output / "adapter")
    return model


def report(model: Any, tokenizer: Any, validation: list[Any], test: list[Any], options: argparse.Namespace) -> str:
    """The policy beside what is cheaper, as a table, and whether it helps."""
    found = evaluate_decoding(
        model.eval(),
        tokenizer,
        Task("GSM8K", validation, test, math_reward, read_math_answer),
        {"learned token policy": model.decoding_adapter},
        samples=4,
        ks=[1, 4],
        token_budgets=options.budget,
        seeds=(options.seed,),
        grid=[{"temperature": t} for t in (0.5, 0.75, 1.0, 1.25)],
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
        "--held-out", type=int, default=200, help="problems to report on; half as many choose baselines"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("gsm8k_policy"))
    options = parser.parse_args()

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        base = AutoModelForCausalLM.from_pretrained(options.model).eval()
    except (OSError, ValueError) as error:
        parser.error(f"--model {options.model} cannot be loaded: {error}")
    try:
        problems = read_problems(options.data, tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{options.data} is not in GSM8K's format: {error!r}")
    random.Random(options.seed).shuffle(problems)
    ends = [options.held_out, options.held_out + max(1, options.held_out // 2)]
    if not 0 < ends[0] < ends[1] < len(problems):
        parser.error(f"--held-out is {ends[0]} of {len(problems)} problems; pass 1 to {(len(problems) - 1) * 2 // 3}.")
    model = train(base, tokenizer, problems[ends[1] :], options)
    print(report(model, tokenizer, problems[ends[0] : ends[1]], problems[: ends[0]], options))
    print(f"\nLoad it in one line: AutoDecoForCausalLM.from_pretrained({str(options.output / 'adapter')!r})")


if __name__ == "__main__":
    main()
