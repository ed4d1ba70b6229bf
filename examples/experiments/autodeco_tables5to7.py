"""AutoDeco, Tables 5 to 7: pass@k of heads against default sampling."""

from __future__ import annotations

from lab import Experiment, Lab, Outcome, gain_table, main, sign_of

EXPERIMENT = Experiment(
    "autodeco_tables5to7",
    "AutoDeco, Tables 5 to 7",
    "What the heads gain at pass@1 is not paid for at pass@16, 32 and 64.",
    "averages over default sampling: +2.0, +4.0, +0.5, +1.5 at pass@16; +2.0, +3.9, -0.1, +2.2 at pass@32; +2.4, +3.9, "
    "+0.7 at pass@64 (the table lists the same value for three sets of its first model)",
)
KS = (16, 32, 64)


def run(lab: Lab) -> Outcome:
    """64 samples of each problem by the heads, and by default sampling."""
    heads = lab.heads("math")
    # All statics at 64 samples would be most of the driver's hour, and the paper shows none.
    grid = [{"temperature": 1.0, "top_p": 0.9}]
    found = lab.evaluate("math", {"learned heads": heads.policy}, samples=max(KS), ks=(1, *KS), grid=grid)
    metrics = [f"pass@{k}" for k in KS]
    gains = [found.find("default")["gain"][metric] for metric in metrics]
    why = (
        "At these k default sampling is close to the ceiling of the testbed, where there is little left to gain or to "
        "lose. One static setting stands beside it (T=1, top-p 0.9), not a whole grid."
    )
    return Outcome(gain_table(found, *metrics), sign_of(gains), why, found.lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
