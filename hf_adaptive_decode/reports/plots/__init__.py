"""Figures as image files; knows numbers, texts and matplotlib, and needs no display."""

from __future__ import annotations

from .coverage import plot_coverage
from .distributions import plot_entropy_by_action, plot_lengths
from .generation import plot_generation
from .measures import plot_accuracy_by_budget, plot_gains
from .soft_top_p import plot_soft_top_p
from .tokens import plot_tokens_by_action
from .training import plot_action_training, plot_training_curves

__all__ = [
    "plot_accuracy_by_budget",
    "plot_action_training",
    "plot_coverage",
    "plot_entropy_by_action",
    "plot_gains",
    "plot_generation",
    "plot_lengths",
    "plot_soft_top_p",
    "plot_tokens_by_action",
    "plot_training_curves",
]
