"""Adaptive Decoding, Table 5: a temperature for each token."""

from __future__ import annotations

from lab import TEMPERATURES, Experiment, Lab, Outcome, Trained, gain_table, main, sign_of

from hf_adaptive_decode.reports.plots import plot_accuracy_by_budget

EXPERIMENT = Experiment(
    "adaptive_table5",
    "Adaptive Decoding, Table 5",
    "A temperature for each token beats greedy decoding and the fixed mixture by far, more so if the remaining "
    "tokens are "
    "known; the token's entropy alone does not suffice.",
    "over greedy: +9.5 told the budget, +7.0 not told; entropy alone about level with the statics (72.0)",
)
BUDGETS = (12, 24, 48)


def policy(lab: Lab, domain: str = "math", *, told: bool = True, entropy_alone: bool = False) -> Trained:
    """A token policy, told the remaining tokens or not, or one that sees the entropy alone."""
    config = {
        "policy": "token_actions",
        "actions": TEMPERATURES,
        "budget_features": ["tokens"] if told else [],
        "features": ["entropy"] if entropy_alone else ["hidden"],
    }
    name = f"token{'' if told else '-twin'}{'-entropy' if entropy_alone else ''}"
    return lab.policy(domain, name, config, budgets=BUDGETS, entropy_coef=0.03)


def run(lab: Lab) -> Outcome:
    """The three policies, on all token budgets together."""
    rivals = {
        "its twin, not told b_t": policy(lab, told=False).policy,
        "entropy alone": policy(lab, entropy_alone=True).policy,
    }
    found = lab.evaluate(
        "math", {"token policy, told b_t": policy(lab).policy}, rivals=rivals, ks=(1,), token_budgets=BUDGETS
    )
    together = type(found)([line for line in found.lines if line.get("token_budget") is None])
    gains = [together.find(role)["gain"]["pass@1"] for role in ("greedy", "mixture", "best_static", "rival")]
    entropy = together.find("rival", decoder="entropy alone")["gain"]["pass@1"]
    why = (
        f"Over {', '.join(map(str, BUDGETS))} tokens together. Over the entropy alone the policy gains "
        f"{100 * entropy['mean']:+.1f} points. {together.verdicts[0]['sentence']}"
    )
    path = lab.picture("adaptive_table5_budgets")
    shown = ("adapter", "rival", "greedy", "default", "best_static")
    plot_accuracy_by_budget([line for line in found.measures if line["role"] in shown and line["token_budget"]], path)
    ours = f"{gain_table(together, 'pass@1')}\n\n![accuracy by token budget](pictures/{path.name})"
    return Outcome(ours, sign_of([*gains, entropy]), why, found.lines)


if __name__ == "__main__":
    main(EXPERIMENT, run)
