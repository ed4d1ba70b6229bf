"""Honest measurements of decoders: metrics, baselines and a runner."""

from __future__ import annotations

from .baselines import best, mean_shift, static_decoders
from .comparison import Comparison, compare_with_baselines
from .metrics import Interval, bootstrap_interval, pass_at_k
from .policies import compare_policies
from .policy_table import policy_table
from .runner import DEFAULT, GREEDY, Decoder, Outcome, run_decoder
from .table import comparison_table

__all__ = [
    "DEFAULT",
    "GREEDY",
    "Comparison",
    "Decoder",
    "Interval",
    "Outcome",
    "best",
    "bootstrap_interval",
    "compare_policies",
    "compare_with_baselines",
    "comparison_table",
    "mean_shift",
    "pass_at_k",
    "policy_table",
    "run_decoder",
    "static_decoders",
]
