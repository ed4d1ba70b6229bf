"""What Tables 1 to 4 and 6 to 9 of Adaptive Decoding share: prompt policies, their twins and their baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab import SEQUENCE_ACTIONS, Experiment, Lab, Outcome, Trained, gain_table, sign_of

from hf_adaptive_decode.evaluation import Evaluation

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
    signs = {metric: sign_of(_gains(found, metric, ("best_static", "mixture"))) for metric in SHOWN}
    twins = {metric: sign_of(_gains(found, metric, ("rival",))) for metric in SHOWN}
    parts = [
        f"Beating both the best static and the mixture: {_in_words(signs)}.",
        f"Knowing B, over the twin: {_in_words(twins)}.",
        why,
        NO_COT if lab.is_testbed else "",
    ]
    words = " ".join(part for part in parts if part)
    sign = signs["pass@1"] if len(set(signs.values())) == 1 else ", ".join(f"{v} at {m}" for m, v in signs.items())
    return Outcome(gain_table(found, *SHOWN), sign, words, found.lines)


def _gains(found: Evaluation, metric: str, roles: Sequence[str]) -> list[dict[str, float]]:
    """The gains at a metric over some roles; over a static that was chosen for another k there is none."""
    k = int(metric.removeprefix("pass@"))
    return [line["gain"][metric] for line in found.measures if line["role"] in roles and line["for_k"] in (None, k)]


def _in_words(signs: Mapping[str, str]) -> str:
    named = {"same": "shown", "opposite": "the opposite is shown", "no difference": "not shown"}
    return ", ".join(f"{named[sign]} at {metric}" for metric, sign in signs.items())


def experiment(name: str, table: str, claim: str, paper: str) -> Experiment:
    """One of these tables."""
    return Experiment(name, f"Adaptive Decoding, {table}", claim, paper)
