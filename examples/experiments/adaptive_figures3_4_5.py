"""Adaptive Decoding, Figures 3, 4 and 5: what a token policy does to entropies, lengths and words."""

from __future__ import annotations

import numpy as np
from adaptive_sequence import policy as prompt_policy
from adaptive_table5 import policy as token_policy
from lab import Experiment, Lab, Outcome, main

from hf_adaptive_decode.actions import describe
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.evaluation.tokens import token_table
from hf_adaptive_decode.reports.plots import plot_entropy_by_action, plot_lengths, plot_tokens_by_action

EXPERIMENT = Experiment(
    "adaptive_figures3_4_5",
    "Adaptive Decoding, Figures 3, 4 and 5",
    "The token policy is cold at tokens of low entropy and keeps heat for those of high entropy; lengths shift little.",
    "no numbers",
)
PROBLEMS, SAMPLES = 200, 4


def run(lab: Lab) -> Outcome:
    """The token policy, the prompt policy and T = 0.75 on the same problems."""
    policy = token_policy(lab).policy
    prompts = [row["prompt"] for row in lab.task("math").test[:PROBLEMS]]
    how = {"samples": SAMPLES, "token_budget": lab.sizes.token_budget, "seed": lab.seed, "batch_rows": 2048}
    written = {
        "token policy": complete(lab.model, lab.tokenizer, prompts, policy=policy, parallel_budget=1, **how),
        "prompt policy": complete(
            lab.model, lab.tokenizer, prompts, policy=prompt_policy(lab, "math").policy, parallel_budget=1, **how
        ),
        "T=0.75": complete(lab.model, lab.tokenizer, prompts, settings={"temperature": 0.75}, **how),
    }
    own, static = (token_table(lab.model, lab.tokenizer, prompts, written[name]) for name in ("token policy", "T=0.75"))
    labels = [describe(action) for action in policy.config.actions]
    paths = {number: lab.picture(f"adaptive_figure_{number}") for number in (3, 4, 5)}
    plot_entropy_by_action(own.entropy, own.action, labels, paths[3], static_entropy=static.entropy)
    lengths = {name: [len(one.token_ids) for group in found for one in group] for name, found in written.items()}
    plot_lengths(lengths, paths[4], token_budget=lab.sizes.token_budget)
    words = [lab.tokenizer.decode([token]) for token in own.token_id.tolist()]
    plot_tokens_by_action(words, own.action, labels, paths[5])
    # A token without an action is one that the base was sure of, which is greedy.
    is_hot = own.temperature >= 1
    cold, hot = float(np.mean(own.entropy[~is_hot])), float(np.mean(own.entropy[is_hot])) if is_hot.any() else 0.0
    means = {name: float(np.mean(values)) for name, values in lengths.items()}
    facts = {"kind": "tokens", "experiment": EXPERIMENT.name, "problems": len(prompts), "samples": SAMPLES}
    line = {**facts, "entropy_cold": cold, "entropy_hot": hot, "hot_share": float(is_hot.mean()), "mean_tokens": means}
    shown = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
    pictures = "\n\n".join(f"![Figure {number}](pictures/{path.name})" for number, path in paths.items())
    why = (
        f"Mean entropy {cold:.3f} nats at tokens below T = 1 and {hot:.3f} at the others, which are "
        f"{100 * is_hot.mean():.1f} % of all. Mean lengths: {shown}."
    )
    return Outcome(pictures, "same" if hot > cold else "opposite", why, [line])


if __name__ == "__main__":
    main(EXPERIMENT, run)
