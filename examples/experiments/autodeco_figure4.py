"""AutoDeco, Figure 4: the temperature head alone, the top-p head alone, and both."""

from __future__ import annotations

from lab import Experiment, Lab, Outcome, gain_table, main, sign_of

EXPERIMENT = Experiment(
    "autodeco_figure4",
    "AutoDeco, Figure 4",
    "Each head alone beats default sampling, and both together are best.",
    "R1-Distill-Qwen-7B on AIME: either head alone gains about 3 to 3.5 points over default sampling; together "
    "the most",
)


def run(lab: Lab) -> Outcome:
    """Three trainings, and the joint heads with one of them switched off."""
    joint = lab.heads("math").policy
    alone = {
        "temperature head, trained alone": lab.heads("math", "temperature", heads=["temperature"]).policy,
        "top-p head, trained alone": lab.heads("math", "top_p", heads=["top_p"]).policy,
    }
    names = ("temperature_only", "top_p_only")
    found = lab.evaluate("math", {"both heads": joint}, baselines=names, rivals=alone, ks=(1,))
    default = found.find("default")["pass@1"]
    better = [line["pass@1"]["low"] > default["high"] for line in found.measures if line["role"] == "rival"]
    over = [line["gain"]["pass@1"] for line in found.measures if line["role"] == "rival"]
    sign = "same" if all(better) and sign_of(over) == "same" else "no difference" if all(better) else "opposite"
    why = (
        "Each head alone is "
        + ("clearly above" if all(better) else "not shown to be above")
        + " default sampling; that both beat either alone is "
        + ("shown." if sign_of(over) == "same" else "not shown for each of them.")
    )
    return Outcome(gain_table(found, "pass@1"), sign, why, found.lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
