"""Adaptive Decoding, Figures 2, 7 and 8: which actions are taken as training goes on, and the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from adaptive_sequence import policy as prompt_policy
from adaptive_table5 import policy as token_policy
from lab import Experiment, Lab, Outcome, Trained, main

from hf_adaptive_decode.actions import describe
from hf_adaptive_decode.reports.plots import plot_action_training

EXPERIMENT = Experiment(
    "adaptive_figures2_7_8",
    "Adaptive Decoding, Figures 2, 7 and 8",
    "In training the policy gathers on a few good actions and never quite leaves the others, while the reward rises.",
    "no numbers; prompts with and without chain of thought go alike for prompt policies, less so for token policies",
)


def run(lab: Lab) -> Outcome:
    """The logs of three trainings, with a panel for each family of problems."""
    trained = {"math": prompt_policy(lab, "math"), "code": prompt_policy(lab, "code"), "tokens": token_policy(lab)}
    names = {"math": "Figure 2", "code": "Figure 7", "tokens": "Figure 8"}
    parts, lines, gathered, rising = [], [], [], []
    for key, one in trained.items():
        path = lab.picture(f"adaptive_{names[key].replace(' ', '_').lower()}")
        labels = [describe(action) for action in one.policy.config.actions]
        plot_action_training(one.log, path, by_type(one.log, len(labels)), labels=labels)
        parts.append(f"{names[key]} ({key}): ![{names[key]}](pictures/{path.name})")
        log = [entry for entry in one.log if "action/0" in entry]
        lines += [{"kind": "training", "experiment": EXPERIMENT.name, "policy": key, **entry} for entry in log]
        gathered.append((_entropy(log[0], len(labels)), _entropy(log[-1], len(labels))))
        rising.append(_rises(one))
    fell = all(last < first for first, last in gathered)
    numbers = ", ".join(f"{first:.2f} to {last:.2f}" for first, last in gathered)
    why = (
        f"The entropy of the shares of the actions went from {numbers} nats, and the training reward "
        f"{'rose' if all(rising) else 'did not rise'} in all three."
    )
    return Outcome("\n\n".join(parts), "same" if fell and all(rising) else "opposite", why, lines)


def by_type(log: Sequence[dict[str, Any]], actions: int) -> dict[str, dict[int, list[float]]]:
    """Shares of the actions by step, for each type of prompt that the log tells apart."""
    kinds = {key.split("/")[2] for entry in log for key in entry if key.startswith("action/0/")}
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in sorted(kinds)}
    for kind, shares in found.items():
        for entry in log:
            if f"action/0/{kind}" in entry:
                shares[entry["step"]] = [entry[f"action/{action}/{kind}"] for action in range(actions)]
    return found


def _entropy(entry: dict[str, Any], actions: int) -> float:
    shares = np.array([entry[f"action/{action}"] for action in range(actions)])
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _rises(one: Trained) -> bool:
    rewards = [entry["objective"] for entry in one.log if "objective" in entry]
    return bool(np.mean(rewards[-4:]) > np.mean(rewards[:4]))


if __name__ == "__main__":
    main(EXPERIMENT, run)
