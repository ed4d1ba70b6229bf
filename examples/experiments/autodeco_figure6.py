"""AutoDeco, Figure 6: training curves."""

from __future__ import annotations

import numpy as np
from lab import Experiment, Lab, Outcome, main

from hf_adaptive_decode.reports.plots import plot_training_curves

EXPERIMENT = Experiment(
    "autodeco_figure6",
    "AutoDeco, Figure 6",
    "The training loss settles within some hundred steps.",
    "about 400 steps of 32 sequences, 6,000 samples in all",
)


def run(lab: Lab) -> Outcome:
    """The log of the heads' training."""
    log = [entry for entry in lab.heads("math").log if "loss" in entry]
    path = lab.picture("autodeco_figure6")
    plot_training_curves({"heads on math": log}, path)
    losses = np.array([entry["loss"] for entry in log], dtype=float)
    first, half, last = losses[:3].mean(), losses[len(losses) // 2 :][:3].mean(), losses[-3:].mean()
    share = (first - half) / (first - last)
    lines = [{"kind": "training", "experiment": EXPERIMENT.name, **entry} for entry in log]
    picture = f"![training curves](pictures/{path.name})"
    ours = f"{picture}\n\nLoss {first:.4f} at first, {half:.4f} half-way, {last:.4f} at last."
    why = f"{100 * share:.0f} % of what the training gains is gained in its first half."
    return Outcome(ours, "same" if last < first and share > 0.5 else "opposite", why, lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
