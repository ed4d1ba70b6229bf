"""Adaptive Decoding, Tables 6 to 8: the same on other base models."""

from __future__ import annotations

from pathlib import Path

from adaptive_sequence import compare, experiment
from lab import Lab, Outcome, main

EXPERIMENT = experiment(
    "adaptive_tables6to8",
    "Tables 6 to 8",
    "The sequence-level adapter gains on other base models as well.",
    "Qwen3-8B, told the budget, over the best static: MATH +0.8 at pass@1, +0.4 at pass@8; code +5.1 and +4.3. "
    "Qwen2.5-Math-1.5B on MATH: +1.1 and +8.1",
)


def run(lab: Lab) -> Outcome:
    """On a base model of the testbed's recipe with another seed, or on `--other-base`."""
    other = lab.other()
    if other is None:
        return Outcome("Not run.", "not comparable", "No other base model was given: pass `--other-base`.")
    return compare(
        other,
        "all",
        ["math", "code"],
        f"Base model: {Path(str(other.base_name)).name}, the testbed's recipe with another seed.",
    )


if __name__ == "__main__":
    main(EXPERIMENT, run)
