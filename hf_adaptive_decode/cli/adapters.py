"""Reads adapters and static settings out of flags; knows nothing of what a command does with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tasks import TESTBED, load_model

_SETTINGS = {"T": "temperature", "P": "top_p", "K": "top_k"}
_STATICS = {"greedy": {"temperature": 0.0}, "default": {"temperature": 1.0}}


def load_for_adapters(args: argparse.Namespace, adapters: Sequence[str]) -> tuple[Any, Any]:
    """
    The model of `--model`, or else the first adapter's own base, or else the embedded one; in evaluation mode, and with
    the LoRA that an adapter may have beside it.

    Args:
        args (`argparse.Namespace`): With `model`, `None` if none was asked for, and `threads`.
        adapters (sequence of `str`): Folders or Hub ids of all that are to decode with it.

    Returns:
        The model and its tokenizer.

    Raises:
        `ValueError`, [`AdapterLoadError`]: If either cannot be loaded, or an adapter's LoRA would be in the way of
            others.
    """
    from ..hub.peft_weights import load_peft
    from ..hub.store import locate

    lora = {adapter: locate(adapter).peft for adapter in dict.fromkeys(adapters)}
    tuned = {adapter: folder for adapter, folder in lora.items() if folder is not None}
    if tuned and len(lora) > 1:
        raise ValueError(
            f"{next(iter(tuned))} comes with a LoRA, which would change the base model of the others too; take one at "
            "a time."
        )
    model, tokenizer = _load_base(args, next(iter(lora), None))
    for folder in tuned.values():
        load_peft(model, folder)
    return model, tokenizer


def _load_base(args: argparse.Namespace, adapter: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    from ..configuration import read_config
    from ..hub.bases import PACKAGED_BASES, load_base
    from ..hub.store import locate

    asked = argparse.Namespace(model=args.model or TESTBED, threads=args.threads)
    if args.model is not None or adapter is None:
        return load_model(asked)
    files = locate(adapter)
    config = read_config(files.config)
    name = config.base_model_name_or_path
    if name in PACKAGED_BASES:
        return load_model(asked)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    how: dict[str, Any] = {"revision": config.base_model_revision or "main", "trust_remote_code": False}
    model: Any = load_base(name, files.source, files.is_remote, **how)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
    except Exception as error:  # damaged files raise whatever their reader raises
        raise ValueError(
            f"the tokenizer of {name}, the base model of {adapter}, cannot be loaded: {error} Pass --model with the "
            "folder or Hub id of the base model and its tokenizer."
        ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def static_settings(text: str, flag: str) -> dict[str, float] | None:
    """The static settings that a flag names, such as `T=0.7,top_p=0.9`; `None` if it names an adapter."""
    from ..types import SamplingParameters
    from ..warping import check_scalars

    if text in _STATICS:
        return _STATICS[text]
    if "=" not in text or Path(text).is_dir():
        return None
    settings: dict[str, Any] = {}
    for part in text.split(","):
        word, _, value = (piece.strip() for piece in part.partition("="))
        name = _SETTINGS.get(word, word.replace("-", "_"))
        if name not in ("temperature", "top_k", "top_p", "min_p") or name in settings:
            raise ValueError(
                f"{flag} {text}: {word!r} is no setting, or is there twice; use T, top_p, top_k and min_p, as in "
                "T=0.7,top_p=0.9."
            )
        try:
            settings[name] = int(value) if name == "top_k" else float(value)
        except ValueError as error:
            kind = "whole number" if name == "top_k" else "number"
            raise ValueError(f"{flag} {text}: {word} is {value!r}; it has to be a {kind}.") from error
    check_scalars(SamplingParameters(**settings))
    return settings
