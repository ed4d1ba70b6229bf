"""The flags that name an engine and what it takes; knows engines by their names alone."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_engine_argument(group: Any, more: str = "") -> None:
    """`--engine`, of which help says `more`, and `--engine-options`."""
    # Their own table of names would load torch.
    names = ["transformers", "continuous_batching", "vllm", "vllm_server"]
    group.add_argument("--engine", default=names[0], choices=names, help=f"what decodes{more}")
    group.add_argument(
        "--engine-options",
        type=_options,
        default={},
        metavar="JSON",
        help='what the engine takes besides, such as \'{"max_model_len": 4096}\' or \'{"url": "http://localhost:8000"}\'',
    )


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} has to be an object, such as {{"max_model_len": 4096}}')
    return found
