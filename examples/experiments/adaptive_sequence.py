"""What Tables 1 to 4 and 6 to 9 of Adaptive Decoding share: prompt policies, their twins and their baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab import SEQUENCE_ACTIONS, Experiment, Lab, Outcome, Trained, gain_table, sign_of

PARALLEL = (1, 2, 4, 8)
SHOWN = ("pass@1", "pass@8")
NO_COT = (
    "The rows with chain-of-thought prompts are left out on the testbed, whose prompts cannot carry an instruction; on "
    "a real base, `REINFORCEDecodingTrainingArguments(cot_ratio=0.3)` is that setting."
)


def policy(lab: Lab, domain: str, *, told: Sequence[str] = ("samples",), actions: Any = None) -> Trained:
    """A prompt policy, told B or not."""
    config = {
        "policy": "sequence_actions",
        "actions": actions or SEQUENCE_ACTIONS,
        "budget_features": list(told),
    }
    name = "sequence" if told else "sequence-twin"
    name += "" if actions is None else f"-{len(actions)}-actions"
    how: dict[str, Any] = {"budgets": [lab.sizes.sequence_budget], "parallel": PARALLEL}
    return lab.policy(domain, name, config, max_steps=2 * lab.sizes.policy_steps, **how)


def compare(
    lab: Lab, trained_on: str, domains: str | Sequence[str], why: str, baselines: Sequence[str] = ()
) -> Outcome:
    """The policy that is told B, beside its twin, the best static, the mixture of its actions and more."""
    told, twin = policy(lab, trained_on), policy(lab, trained_on, told=())
    found = lab.evaluate(
        domains,
        {"prompt policy, told B": told.policy},
        rivals={"its twin, not told B": twin.policy},
        baselines=("greedy", "default", "mean_shift", "best_static", "mixture", *baselines),
        ks=(1, 8),
        token_budgets=lab.sizes.sequence_budget,
    )
    gains = [line["gain"][f"pass@{line['for_k']}"] for line in found.measures if line["role"] == "best_static"]
    gains += [line["gain"][metric] for line in found.measures if line["role"] == "mixture" for metric in SHOWN]
    twins = [line["gain"][metric] for line in found.measures if line["role"] == "rival" for metric in SHOWN]
    parts = [
        f"Beating both the best static and the mixture at B = 1 and 8: {_shown(sign_of(gains))}. Knowing B: "
        f"{_shown(sign_of(twins))} over the twin at both.",
        why,
        NO_COT if lab.is_testbed else "",
    ]
    return Outcome(gain_table(found, *SHOWN), sign_of(gains), " ".join(part for part in parts if part), found.lines)


def _shown(sign: str) -> str:
    return {"same": "shown", "opposite": "the opposite is shown for one", "no difference": "not shown for all"}[sign]


def experiment(name: str, table: str, claim: str, paper: str) -> Experiment:
    """One of these tables."""
    return Experiment(name, f"Adaptive Decoding, {table}", claim, paper)
