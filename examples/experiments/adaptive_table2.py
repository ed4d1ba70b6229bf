"""Adaptive Decoding, Table 2: a configuration for each prompt, on code."""

from __future__ import annotations

from adaptive_sequence import compare, experiment
from lab import Lab, Outcome, main

EXPERIMENT = experiment(
    "adaptive_table2",
    "Table 2",
    "On CodeContests the sequence-level adapter beats the best static strategy and the fixed mixture.",
    "told the budget, over the best static: +3.1 at pass@1, +0.3 at pass@8 (+4.9 and +3.4 with "
    "chain-of-thought prompts); "
    "not told: +3.1 and +3.3",
)


def run(lab: Lab) -> Outcome:
    """Trained and measured on the domain `code`: on the testbed, search whose answer can be checked."""
    return compare(lab, "code", "code", "The two families of this domain want heat of a like kind.")


if __name__ == "__main__":
    main(EXPERIMENT, run)
