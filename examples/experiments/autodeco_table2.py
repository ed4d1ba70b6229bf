"""AutoDeco, Table 2: the same heads out of the domain that they were trained on."""

from __future__ import annotations

from lab import Experiment, Lab, Outcome, gain_table, main, sign_of

EXPERIMENT = Experiment(
    "autodeco_table2",
    "AutoDeco, Table 2",
    "Heads that were trained on mathematics alone beat greedy search and default sampling on other tasks, too.",
    "averages of four general sets: +3.4, +4.4, +1.2, +0.8 over default sampling and +1.3, +7.6, +1.4, +2.9 "
    "over greedy "
    "search (the models of Table 1)",
)


def run(lab: Lab) -> Outcome:
    """Heads trained on the domain `math`, on test problems of `code`."""
    found = lab.evaluate("code", {"learned heads": lab.heads("math").policy})
    gains = [found.find(role)["gain"]["pass@1"] for role in ("greedy", "default")]
    why = (
        "Nothing in the training showed the heads these families of problems, whose forks look otherwise; what carries "
        f"over is to be cold where the model calculates. {found.verdicts[0]['sentence']}"
    )
    return Outcome(gain_table(found, "pass@1"), sign_of(gains), why, found.lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
