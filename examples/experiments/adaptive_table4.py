"""Adaptive Decoding, Table 4: one prompt policy for two domains."""

from __future__ import annotations

from adaptive_sequence import compare, experiment
from lab import Lab, Outcome, main

EXPERIMENT = experiment(
    "adaptive_table4",
    "Table 4",
    "Trained on both domains, one adapter still beats the static strategies on each, by less than its own domain's.",
    "told the budget, over the best static: MATH +2.2 at pass@1 and +1.7 at pass@8, code +1.9 and +5.2",
)


def run(lab: Lab) -> Outcome:
    """Trained on all families, measured on each domain."""
    why = "Here the best static is chosen for each domain apart, which is what the policy has to find out by itself."
    return compare(lab, "all", ["math", "code"], why)


if __name__ == "__main__":
    main(EXPERIMENT, run)
