"""The flags that both training commands have, and `--set` for every other argument of a trainer; knows no data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .config_file import UsageError
from .tasks import count, positive

# What a command says itself, and what would put a secret where others see it.
_NOT_BY_SET = {
    "output_dir": "--output",
    "max_steps": "--steps",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
    "save_strategy": "--save-steps",
    "save_steps": "--save-steps",
    "resume_from_checkpoint": "--resume",
    "report_to": "--report-to",
    "push_to_hub": "--push-to-hub",
    "hub_model_id": "--push-to-hub",
    "hub_private_repo": "--private",
    "hub_token": "--token-file",
    "remove_unused_columns": None,
    "do_train": None,
    "do_eval": None,
    "do_predict": None,
}
# What changes nothing about a trained adapter, so that a run may go on, or be measured again, with others.
FREE = {"command", "json", "config", "output", "threads", "resume", "save_steps", "report_to", "rollout_batch_rows"}
FREE |= {"test_problems", "eval_batch_rows", "push_to_hub", "private", "token_file"}


def add_run_arguments(group: Any, save_steps: int) -> None:
    """Checkpoints, trackers, and every other argument of the trainer."""
    group.add_argument("--save-steps", type=count, default=save_steps, help="steps between checkpoints, 0 for none")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the last checkpoint in --output; --no-resume deletes those and starts over",
    )
    group.add_argument("--report-to", nargs="+", default=["none"], help="trackers of transformers: tensorboard, ...")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the trainer, by its name in Python: weight_decay=0.1; repeatable",
    )


def add_comparison_arguments(group: Any) -> None:
    """How much to measure a trained adapter on."""
    group.add_argument("--validation-problems", type=positive, default=300, help="to choose baselines on")
    group.add_argument("--eval-samples", type=positive, default=8, help="completions of each problem")
    group.add_argument("--eval-batch-rows", type=positive, default=256, help="sequences decoded at once")


def check_trackers(names: Sequence[str]) -> None:
    """
    Refuses a tracker that is not there.

    Raises:
        `ValueError`: If transformers knows none of that name, or its package is not installed.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = {"none", "all", *get_available_reporting_integrations()}
    if not set(names) <= known:
        raise ValueError(f"--report-to is {' '.join(names)}; installed are: {', '.join(sorted(known))}.")


def trainer_settings(kind: Any, pairs: Sequence[str], own: Mapping[str, str]) -> dict[str, Any]:
    """
    The values of `--set`, of the types that the trainer's arguments have.

    Args:
        kind (`type`): The dataclass of the arguments.
        pairs (sequence of `str`): NAME=VALUE. `none` where a value may be missing; lists and dicts as JSON.
        own (mapping): The command's flags for some of the names.

    Raises:
        [`UsageError`]: If there is no such name, a flag has it, or the value has another type.
    """
    from transformers import HfArgumentParser

    class Reader(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message.partition(": ")[2] or message)

    reader = Reader(kind, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    flags = _NOT_BY_SET | dict(own)
    known = {field.name for field in dataclasses.fields(kind) if field.init} - {
        n for n, f in flags.items() if f is None
    }
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise UsageError(
                f"--set {pair}: it has to be NAME=VALUE with a NAME of {kind.__name__}.{_close(name, known)}"
            )
        if name in flags:
            raise UsageError(f"--set {pair}: `{name}` is what {flags[name]} is for.")
        if name in found:
            raise UsageError(f"--set {pair}: `{name}` is set twice.")
        try:
            found[name] = _value(reader, name, text.strip(), hints[name])
        except UsageError as error:
            raise UsageError(f"--set {pair}: {error}") from error
    return found


def _close(name: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, sorted(known), n=3)
    return f" Is it {' or '.join(close)}?" if close else ""


def _value(reader: Any, name: str, text: str, hint: Any) -> Any:
    if text.lower() in ("none", "null") and type(None) in typing.get_args(hint):
        return None
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"it is no JSON: {error}") from error
    return vars(reader.parse_args([f"--{name}={text}"]))[name]
