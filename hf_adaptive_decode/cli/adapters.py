"""Finds the base model of the adapters that flags name; knows nothing of what a command does with them."""

from __future__ import annotations

import argparse
from typing import Any

from .tasks import TESTBED, load_model


def load_for_adapter(args: argparse.Namespace, adapter: str | None) -> tuple[Any, Any]:
    """
    The model of `--model`, or else the adapter's own base, or else the embedded one; in evaluation mode.

    Args:
        args (`argparse.Namespace`): With `model`, `None` if none was asked for, and `threads`.
        adapter (`str`, *optional*): Folder or Hub id.

    Returns:
        The model and its tokenizer.

    Raises:
        `ValueError`, [`AdapterLoadError`]: If either cannot be loaded.
    """
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
