"""What an epoch cache may be asked for, and beside what it cannot be; knows the arguments, no model and no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EPOCH_CACHES = ("distribution", "hidden")

# The column of a row's number in a tokenised data set, and its name in a batch.
ROW_COLUMN = "cache_row"


def epoch_cache_folder(args: Any) -> Path:
    """Where the caches of a run lie."""
    return Path(args.epoch_cache_dir or Path(args.output_dir, "epoch_cache"))


def check_epoch_cache(args: Any) -> None:
    """
    Raises `ValueError` where hidden states could not be kept, or nothing would be.

    Args:
        args ([`AutoDecoTrainingArguments`]): The arguments.
    """
    kind = args.epoch_cache
    if kind is None:
        if args.epoch_cache_dir is not None:
            raise ValueError(
                f"`epoch_cache_dir` is {args.epoch_cache_dir!r} and `epoch_cache` is None; set it to one of "
                f"{', '.join(map(repr, EPOCH_CACHES))} to use it."
            )
        return
    if kind not in EPOCH_CACHES:
        allowed = ", ".join(map(repr, EPOCH_CACHES))
        raise ValueError(f"`epoch_cache` is {kind!r}; it has to be one of {allowed}, or None for none.")
    clashes = {
        "train_peft": (args.train_peft, "a LoRA that learns changes the base's hidden states from step to step"),
        "control_loss_weight": (args.control_loss_weight > 0, "prompts with commands are not kept"),
        "fp16_full_eval": (args.fp16_full_eval, "it changes the base's precision between training and evaluation"),
        "bf16_full_eval": (args.bf16_full_eval, "it changes the base's precision between training and evaluation"),
    }
    for name, (is_set, reason) in clashes.items():
        if is_set:
            raise ValueError(
                f"`epoch_cache` is {kind!r} and `{name}` is {vars(args)[name]!r}: {reason}. Leave one of them out."
            )
    if args.push_to_hub and Path(args.output_dir).resolve() in epoch_cache_folder(args).resolve().parents:
        raise ValueError(
            f"`push_to_hub` uploads `output_dir`, and the epoch cache would lie in it, at {epoch_cache_folder(args)}; "
            "set `epoch_cache_dir` to a folder outside."
        )
