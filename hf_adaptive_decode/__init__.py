"""Learned decoding for any Hugging Face causal language model: the public names, each loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _registration
from ._version import __version__

_WHERE = {
    "AdaptiveSamplerLogitsProcessor": "sampler",
    "AutoDecoConfig": "configuration",
    "AutoDecoForCausalLM": "modeling",
    "AutoDecoTrainer": "training",
    "AutoDecoTrainingArguments": "training",
    "Budget": "types",
    "DecodeState": "types",
    "DecodingTrace": "types",
    "REINFORCEDecodingTrainer": "training",
    "REINFORCEDecodingTrainingArguments": "training",
    "SamplingParameters": "types",
}
__all__ = ["__version__", *_WHERE]

_registration.install()

if TYPE_CHECKING:
    from .configuration import AutoDecoConfig
    from .modeling import AutoDecoForCausalLM
    from .sampler import AdaptiveSamplerLogitsProcessor
    from .training import (
        AutoDecoTrainer,
        AutoDecoTrainingArguments,
        REINFORCEDecodingTrainer,
        REINFORCEDecodingTrainingArguments,
    )
    from .types import Budget, DecodeState, DecodingTrace, SamplingParameters


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
