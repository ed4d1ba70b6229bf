"""The flags of `train-policy`; knows no data, no model and no trainer."""

from __future__ import annotations

import argparse
from typing import Any

from .push import add_upload_arguments
from .tasks import add_prompt_arguments, add_task_arguments, count, positive
from .training_flags import add_comparison_arguments, add_run_arguments


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them; the defaults are for the embedded model."""
    parser.add_argument("--output", default="policy_output", metavar="DIR", help="for DIR/adapter and DIR/evaluation")
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of problems, training and sampling")
    add_task_arguments(parser)
    add_prompt_arguments(parser)
    _policy_arguments(parser.add_argument_group("policy"))
    _training_arguments(parser.add_argument_group("training"))
    _evaluation_arguments(parser.add_argument_group("comparison"))
    add_upload_arguments(parser.add_argument_group("hub"))


def _policy_arguments(group: Any) -> None:
    group.add_argument(
        "--policy",
        default="token_actions",
        choices=["token_actions", "sequence_actions"],
        help="whether an action is chosen for each token or for each prompt",
    )
    group.add_argument(
        "--actions",
        nargs="+",
        help="a preset (math, code, mixed, token_math), a JSON file as select-actions writes it, or temperatures; by "
        "default token_math for tokens and math for prompts",
    )
    group.add_argument("--features", nargs="+", default=["hidden"], choices=["hidden", "statistics", "entropy"])
    group.add_argument(
        "--told",
        nargs="+",
        choices=["tokens", "samples", "none"],
        help="what the policy knows of the budget; by default the tokens left for tokens, the samples for prompts",
    )
    group.add_argument("--pooling", default="last", choices=["last", "mean"], help="of the prompt's hidden states")
    for name, budget in (("--max-token-budget", "--budget"), ("--max-parallel-budget", "--parallel-budget")):
        group.add_argument(name, type=positive, help=f"largest that is told apart; by default the largest {budget}")
    group.add_argument("--deterministic", action="store_true", help="decode with the likeliest action")
    group.add_argument("--hidden-size", type=positive, default=128, help="width of the two hidden layers")
    group.add_argument("--dropout", type=float, default=0.1, help="theirs, in training")
    group.add_argument(
        "--prior",
        type=float,
        metavar="P",
        help="start with this probability of the action that is the best static on the validation problems, for each "
        "parallel budget; by default all actions start alike",
    )


def _training_arguments(group: Any) -> None:
    group.add_argument("--train-problems", type=positive, help="by default all there are, and 4000 of the testbed")
    group.add_argument("--steps", type=positive, default=60)
    group.add_argument("--prompts-per-step", type=positive, default=96)
    group.add_argument("--num-generations", type=positive, default=8, help="completions of each prompt")
    group.add_argument("--budget", type=positive, nargs="+", default=[48], help="new tokens of each completion")
    group.add_argument("--parallel-budget", type=positive, nargs="+", default=[1], help="B, one or several")
    # The others of the trainer need a scorer or a reader of answers, which a command line cannot hand over.
    group.add_argument("--reward-aggregation", default="mean", choices=["mean", "pass@B"])
    group.add_argument("--baseline", default="leave_one_out", choices=["leave_one_out", "batch", "ema", "none"])
    group.add_argument("--entropy-coef", type=float, default=0.03)
    group.add_argument("--kl-coef", type=float, default=0.0)
    group.add_argument(
        "--max-prob-mask", type=float, default=0.95, help="tokens surer than this are greedy (token policies); 0: none"
    )
    group.add_argument("--cot-ratio", type=float, default=0.0, help="part of the prompts that ask for a thought")
    group.add_argument("--cot-template", help="math, code, step_by_step, or the text itself")
    group.add_argument("--prefilter-samples", type=count, default=0, help="samples a prompt to filter prompts by")
    group.add_argument("--learning-rate", type=float, default=3e-3)
    group.add_argument("--rollout-batch-rows", type=positive, help="most completions decoded at once in training")
    group.add_argument(
        "--rollout-engine",
        default="transformers",
        choices=["transformers", "continuous_batching", "vllm", "vllm_server"],
        help="what decodes in training",
    )
    add_run_arguments(group, save_steps=20)
    group.add_argument("--log-completions", action="store_true", help="write them to DIR/training/completions")


def _evaluation_arguments(group: Any) -> None:
    add_comparison_arguments(group)
    group.add_argument("--test-problems", type=count, default=600, help="to report on; 0 for no comparison")
    group.add_argument(
        "--twin", action="store_true", help="also train the same policy without its knowledge of the budget"
    )
