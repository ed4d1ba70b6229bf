"""A static setting as a generation config in a folder of its own; knows transformers' file format and no adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig

from ..errors import SamplingParameterError
from ..types import SamplingParameters
from ..warping import check_scalars
from .writing import replacing

STATIC_FILE = "static/generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_static_generation_config(
    folder: str | os.PathLike[str], static: Mapping[str, float], base_generation_config_tokens: Mapping[str, Any]
) -> Path:
    """
    Writes `static/generation_config.json`, never the adapter's own file, for the base model without the adapter.

    Args:
        folder (`str` or `os.PathLike`): The adapter's.
        static (mapping of `str` to `float`): The setting: `temperature` and, if it has them, `top_p`, `top_k`, `min_p`.
            Temperature 0 is greedy decoding.
        base_generation_config_tokens (mapping): The base's `bos_token_id`, `eos_token_id` and `pad_token_id`, as far
            as it has them.

    Returns:
        `Path`: The file. Read it with `GenerationConfig.from_pretrained(folder, "static/generation_config.json")`;
        with `subfolder="static"` transformers may read the adapter's own.

    Raises:
        [`SamplingParameterError`]: If the setting has an unknown name or a value outside its range.
    """
    try:
        check_scalars(SamplingParameters(**cast(dict[str, Any], static)))
    except TypeError as error:
        raise SamplingParameterError(f"the static setting {dict(static)!r} is none: {error}") from error
    tokens = {name: base_generation_config_tokens.get(name) for name in SPECIAL_TOKENS}
    if static.get("temperature", 1.0) == 0:
        config = GenerationConfig(do_sample=False, **tokens)
    else:
        config = GenerationConfig(
            **{"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **static, **tokens}
        )
    path = Path(folder, STATIC_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged:
        config.save_pretrained(staged.parent)
    return path
