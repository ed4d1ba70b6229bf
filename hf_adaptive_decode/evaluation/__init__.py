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
    "ControlEffect",
    "Decoder",
    "Decomposition",
    "Evaluation",
    "Interval",
    "Outcome",
    "ShuffledPolicy",
    "Source",
    "Task",
    "TokenTable",
    "Trace",
    "Verdict",
    "bootstrap_interval",
    "control_effect",
    "decompose",
    "evaluate_decoding",
    "expert_search",
    "judge",
    "load_task",
    "measure_entropies",
    "module_path",
    "only",
    "pass_at_k",
    "run_decoder",
    "shuffled",
    "token_table",
    "trace_problem",
    "turn_temperature",
]

if TYPE_CHECKING:
    from .ablation import only
    from .control import ControlEffect, control_effect
    from .controls import CONTROLS, EVERY_FAIR, STANDARD
    from .decomposition import Decomposition, decompose
    from .evaluate import evaluate_decoding
    from .metrics import Interval, bootstrap_interval, pass_at_k
    from .modules import module_path
    from .results import Evaluation
    from .runner import DEFAULT, GREEDY, Decoder, Outcome, run_decoder
    from .search import expert_search, measure_entropies, turn_temperature
    from .shuffle import ShuffledPolicy, shuffled
    from .sources import Source
    from .tasks import Task, load_task
    from .tokens import TokenTable, token_table
    from .traces import Trace, trace_problem
    from .verdict import Verdict, judge

_NAMES = {
    "ablation": ("only",),
    "control": (
        "ControlEffect",
        "control_effect",
    ),
    "controls": (
        "CONTROLS",
        "EVERY_FAIR",
        "STANDARD",
    ),
    "decomposition": (
        "Decomposition",
        "decompose",
    ),
    "evaluate": ("evaluate_decoding",),
    "metrics": (
        "Interval",
        "bootstrap_interval",
        "pass_at_k",
    ),
    "modules": ("module_path",),
    "results": ("Evaluation",),
    "runner": (
        "DEFAULT",
        "GREEDY",
        "Decoder",
        "Outcome",
        "run_decoder",
    ),
    "search": (
        "expert_search",
        "measure_entropies",
        "turn_temperature",
    ),
    "shuffle": (
        "ShuffledPolicy",
        "shuffled",
    ),
    "sources": ("Source",),
    "tasks": (
        "Task",
        "load_task",
    ),
    "tokens": (
        "TokenTable",
        "token_table",
    ),
    "traces": (
        "Trace",
        "trace_problem",
    ),
    "verdict": (
        "Verdict",
        "judge",
    ),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
