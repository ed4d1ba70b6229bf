"""Verifiable rewards in TRL's signature, each loaded when first used; knows no model and no trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "SandboxUnavailableError": "confinement",
    "code_reward": "code",
    "exact_match_reward": "exact",
    "math_reward": "math",
}
__all__ = ["SandboxUnavailableError", "code_reward", "exact_match_reward", "math_reward"]

if TYPE_CHECKING:
    from .code import code_reward
    from .confinement import SandboxUnavailableError
    from .exact import exact_match_reward
    from .math import math_reward


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
