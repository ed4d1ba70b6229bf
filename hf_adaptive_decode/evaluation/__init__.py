"""Honest measurements of decoders: metrics, baselines, verdicts and what runs them, each loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "CONTROLS",
    "DEFAULT",
    "EVERY_FAIR",
    "GREEDY",
    "STANDARD",
    "Decoder",
    "Evaluation",
    "Interval",
    "Outcome",
    "Task",
    "Verdict",
    "bootstrap_interval",
    "evaluate_decoding",
    "judge",
    "load_task",
    "pass_at_k",
    "run_decoder",
]

if TYPE_CHECKING:
    from .controls import CONTROLS, EVERY_FAIR, STANDARD
    from .evaluate import evaluate_decoding
    from .metrics import Interval, bootstrap_interval, pass_at_k
    from .results import Evaluation
    from .runner import DEFAULT, GREEDY, Decoder, Outcome, run_decoder
    from .tasks import Task, load_task
    from .verdict import Verdict, judge

_NAMES = {
    "controls": ("CONTROLS", "EVERY_FAIR", "STANDARD"),
    "evaluate": ("evaluate_decoding",),
    "metrics": ("Interval", "bootstrap_interval", "pass_at_k"),
    "results": ("Evaluation",),
    "runner": ("DEFAULT", "GREEDY", "Decoder", "Outcome", "run_decoder"),
    "tasks": ("Task", "load_task"),
    "verdict": ("Verdict", "judge"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
