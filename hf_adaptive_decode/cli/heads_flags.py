"""The flags of `train-heads`, and what of the heads' config and their trainer's arguments they stand for; knows no data
and no model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .push import add_upload_arguments
from .tasks import above_zero, add_prompt_arguments, add_task_arguments, positive
from .training_flags import add_comparison_arguments, add_run_arguments

# Flags that replace what a recipe says, by the names that the trainer has for them.
OF_RECIPE = {
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "max_length": "max_length",
    "loss_type": "loss_type",
    "alpha": "alpha",
    "dft_weight": "dft_weight",
    "easy_token_mask_ratio": "easy_token_mask_ratio",
    "easy_token_mask_target": "easy_token_mask_target",
    "control_loss_weight": "control_loss_weight",
    "bf16": "bf16",
}
OWN = {field: f"--{name.replace('_', '-')}" for name, field in OF_RECIPE.items()}
OWN |= {"num_train_epochs": "--epochs", "control_commands": "--control-commands"}
OWN |= {"train_peft": "--lora-rank", "peft_learning_rate": "--lora-learning-rate"}
# Flags of the comparison, which the trained heads do not depend on.
LATER = {"evaluate", "task", "baselines", "validation_problems", "eval_samples"}
_SETTINGS = {"features": "features", "hidden_size": "head_hidden_size", "detach_temperature": "detach_temperature"}


def add_heads_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them; the defaults are for the embedded model."""
    parser.add_argument("--output", default="heads_output", metavar="DIR", help="for DIR/adapter and DIR/evaluation")
    parser.add_argument("--seed", type=int, default=0, help="seeds the choice of data, training and sampling")
    add_task_arguments(parser)
    add_prompt_arguments(parser)
    _data_arguments(
        parser.add_argument_group(
            "data",
            "--dataset holds texts (`prompt` and `completion`, `messages`, `text` or `input_ids`) to be learned from "
            "as they are. With --sample it holds problems, and the model learns from its own solutions that --reward "
            "finds right (AutoDeco, section 3.1).",
        )
    )
    _config_arguments(parser.add_argument_group("heads"))
    _training_arguments(parser.add_argument_group("training"))
    _evaluation_arguments(parser.add_argument_group("comparison"))
    add_upload_arguments(parser.add_argument_group("hub"))


def _data_arguments(group: Any) -> None:
    group.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="train on the model's own verified solutions; by default only for the embedded problems",
    )
    group.add_argument("--completion-column", default="completion", metavar="NAME", help="beside --prompt-column")
    group.add_argument(
        "--hold-out",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave the prompts of texts that `evaluate` would measure on out of training; --no-hold-out trains on all",
    )
    group.add_argument(
        "--train-problems",
        type=positive,
        help="how many texts or problems to use; by default all there are, and 1500 of the testbed",
    )
    group.add_argument(
        "--budget",
        type=positive,
        nargs="+",
        default=[48],
        metavar="N",
        help="new tokens of each completion that is sampled",
    )
    group.add_argument(
        "--num-generations", type=positive, metavar="N", default=4, help="completions of each problem at each heat"
    )
    group.add_argument(
        "--keep", type=positive, metavar="N", default=2, help="how many right ones of a problem to train on"
    )
    group.add_argument(
        "--rollout-batch-rows", type=positive, metavar="N", default=256, help="most completions sampled at once"
    )


def _config_arguments(group: Any) -> None:
    group.add_argument(
        "--heads", nargs="+", default=["temperature", "top_p"], choices=["temperature", "top_p"], help="which to train"
    )
    group.add_argument(
        "--features",
        nargs="+",
        default=["hidden"],
        choices=["hidden", "statistics", "entropy"],
        help="what they see: the model's hidden state, statistics of its distribution, or its entropy alone",
    )
    group.add_argument("--hidden-size", type=positive, metavar="N", default=256, help="width of a head's hidden layer")
    group.add_argument(
        "--detach-temperature", action="store_true", help="top-p sees the temperature and sends no gradient back to it"
    )
    group.add_argument(
        "--top-p-statistics",
        action="store_true",
        help="the top-p head also sees statistics of the distribution at the predicted temperature, as AutoDeco's "
        "released heads do",
    )
    for name, ends in (("--temperature-range", "0 and 2"), ("--top-p-range", "0 and 1")):
        group.add_argument(
            name, type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"what is predicted; by default between {ends}"
        )


def _training_arguments(group: Any) -> None:
    group.add_argument(
        "--recipe",
        default="testbed",
        choices=["testbed", "paper"],
        help="what other flags here do not say: settings that were chosen on the embedded model (300 steps of 64 "
        "examples, learning rate 3e-3, DFT weight off), or those of the AutoDeco paper (400 steps of 32, 5e-6, base)",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N")
    length.add_argument("--epochs", type=above_zero, metavar="X", help="passes over the data, in place of --steps")
    group.add_argument("--batch-size", type=positive, metavar="N", help="examples at once")
    group.add_argument("--gradient-accumulation-steps", type=positive, metavar="N", help="batches of a step")
    group.add_argument("--learning-rate", type=above_zero, metavar="X")
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of an example, the rest of which is cut"
    )
    group.add_argument("--loss-type", choices=["end_to_end", "two_loss"], help="the paper's, or its released code's")
    group.add_argument("--alpha", type=above_zero, metavar="X", help="steepness of the soft top-p mask")
    group.add_argument("--dft-weight", choices=["off", "base", "scaled"], help="Dynamic Fine-Tuning's")
    group.add_argument("--easy-token-mask-ratio", type=float, metavar="X", help="part of the easy tokens to drop")
    group.add_argument(
        "--easy-token-mask-target", choices=["both", "temperature"], help="whose loss they are dropped of"
    )
    group.add_argument(
        "--control-loss-weight",
        type=float,
        metavar="X",
        help="of the ranking loss of prompts with commands (AutoDeco, section 3.3)",
    )
    group.add_argument(
        "--control-commands",
        metavar="FILE.json",
        help='commands to put behind prompts, {"low": [...], "high": [...]}, or `diversity` for built-in ones; by '
        "default the columns low_prompt and high_prompt of the data",
    )
    group.add_argument(
        "--lora-rank",
        type=positive,
        metavar="N",
        help="also put a LoRA of this rank into the base model and train it together with the heads, which both papers "
        "leave to later work; it is saved beside them",
    )
    group.add_argument("--lora-learning-rate", type=above_zero, metavar="X", help="by default --learning-rate")
    group.add_argument("--bf16", action="store_true", default=None, help="run the base model's forward pass in bf16")
    add_run_arguments(group, save_steps=100)


def _evaluation_arguments(group: Any) -> None:
    group.add_argument("--evaluate", action="store_true", help="end with a table of the heads beside every baseline")
    group.add_argument(
        "--task",
        nargs="+",
        metavar="NAME[=PATH]",
        help="what to measure on, as `evaluate` takes it; by default the problems of --dataset that are held out",
    )
    group.add_argument("--baselines", nargs="+", metavar="NAME", help="as `evaluate` takes them")
    group.add_argument(
        "--test-problems", type=positive, metavar="N", default=600, help="at most how many of a task to report on"
    )
    add_comparison_arguments(group)


def heads_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The config's settings."""
    found = {"heads": args.heads, **{setting: vars(args)[name] for name, setting in _SETTINGS.items()}}
    ranges = {name: vars(args)[name] for name in ("temperature_range", "top_p_range")}
    found |= {name: ends for name, ends in ranges.items() if ends is not None}
    return found | ({"top_p_statistics": True} if args.top_p_statistics else {})


def control_commands(args: argparse.Namespace) -> Any:
    """
    What `--control-commands` names.

    Raises:
        `ValueError`: If it is no file with commands.
    """
    named: str | None = args.control_commands
    if named is None or Path(named).suffix != ".json":
        return named
    try:
        return json.loads(Path(named).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--control-commands {named} cannot be read: {error}") from error
