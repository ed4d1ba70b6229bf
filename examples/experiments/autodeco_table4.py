"""AutoDeco, Table 4 and Figure 5: what commands for more or less variety do to the heads' predictions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lab import Experiment, Lab, Outcome, main

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from language_control import train, training_rows

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.evaluation.control_table import control_table, measure_control
from hf_adaptive_decode.evaluation.runner import Decoder
from hf_adaptive_decode.evaluation.traces import trace_problem
from hf_adaptive_decode.reports.plots import plot_generation
from hf_adaptive_decode.testbed import build_problems
from hf_adaptive_decode.testbed.commands import COMMANDS, build_command_base
from hf_adaptive_decode.training.control import DIVERSITY_COMMANDS, CommandSet, with_command

EXPERIMENT = Experiment(
    "autodeco_table4",
    "AutoDeco, Table 4 and Figure 5",
    "A command for less or more variety lowers or raises the predicted temperature and top-p: in an example without "
    "targeted training (Figure 5), and for nearly all prompts after training with a ranking loss (Table 4).",
    "100 prompts, after targeted training: T 0.72 to 0.61 (low, 99 % of the prompts) and 0.82 (high, 96 %); top-p 0.79 "
    "to 0.73 (97 %) and 0.83 (85 %)",
)
PROMPTS, SAMPLES, TARGETED_STEPS = 100, 4, 200


def run(lab: Lab) -> Outcome:
    """Heads on a base that has seen such commands, before and after targeted training, on commands held out of it."""
    base, tokenizer, taught, asked = _base(lab)
    torch.manual_seed(lab.seed)
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig()).eval()
    budget = lab.sizes.token_budget
    with model.disable_adapter():
        rows = training_rows(model, tokenizer, lab.sizes.heads_problems, budget, lab.seed)
    train(model, tokenizer, rows, lab.sizes.heads_steps, lab.seed, learning_rate=3e-3)
    prompts = [row["prompt"] for row in build_problems("test", PROMPTS, seed=lab.seed)]
    how = {"token_budget": budget, "samples": SAMPLES, "seed": lab.seed, "batch_rows": 1024}
    found = {"before": measure_control(model, tokenizer, prompts, asked, **how)}
    _picture(lab, model, tokenizer, asked, "autodeco_figure5_before")
    targeted = {"control_loss_weight": 2.0, "control_temperature_margin": 0.1, "control_top_p_margin": 0.02}
    targeted |= {"control_commands": taught, "learning_rate": 3e-3}
    train(model, tokenizer, rows, TARGETED_STEPS, lab.seed, **targeted)
    found["after"] = measure_control(model, tokenizer, prompts, asked, **how)
    _picture(lab, model, tokenizer, asked, "autodeco_figure5_after")
    lines = [
        {
            "kind": "control",
            "experiment": EXPERIMENT.name,
            "stage": stage,
            "prompts": PROMPTS,
            "samples": SAMPLES,
            **row,
        }
        for stage, result in found.items()
        for row in result["rows"]
    ]
    parts = [f"{stage.capitalize()} targeted training:\n\n{control_table(result)}" for stage, result in found.items()]
    parts += [f"![{stage}](pictures/autodeco_figure5_{stage}.png)" for stage in found]
    return Outcome("\n\n".join(parts), _sign(lines, "after"), _why(lines), lines)


def _base(lab: Lab) -> tuple[Any, Any, Any, CommandSet]:
    """A base that knows commands, its tokenizer, the commands to train with and those to ask with."""
    if lab.base_name is not None:
        return lab.base(), lab.tokenizer, "diversity", DIVERSITY_COMMANDS["held_out"]
    base, tokenizer = build_command_base(lab.seed)
    return base.eval(), tokenizer, COMMANDS["train"], CommandSet(**COMMANDS["held_out"])


def _picture(lab: Lab, model: Any, tokenizer: Any, asked: CommandSet, name: str) -> None:
    """T and P over a completion of one prompt without a command, and with one of each kind."""
    (row,) = build_problems("test", 4, types=["coin"], seed=lab.seed)[-1:]
    panels = {}
    for kind, command in (("no command", None), ("low", asked.low[0]), ("high", asked.high[0])):
        prompt = row["prompt"] if command is None else with_command(row["prompt"], command)
        decoder = Decoder(kind, policy=model.decoding_adapter)
        how = {"token_budget": lab.sizes.token_budget, "seed": lab.seed}
        (trace,) = trace_problem(model, tokenizer, {"prompt": prompt}, None, decoder, **how)
        values = {name: [getattr(token, name) for token in trace.tokens] for name in ("temperature", "top_p")}
        panels[kind] = {**values, "tokens": [token.text for token in trace.tokens]}
    plot_generation(panels, lab.picture(name))


def _own(lines: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["stage"] == stage and line["text"] == "own"]


def _sign(lines: list[dict[str, Any]], stage: str) -> str:
    """Whether T moves as commanded, beyond its interval, under every command."""
    moved = []
    for line in _own(lines, stage):
        way = 1 if line["direction"] == "high" else -1
        interval = line["temperature"]["interval"]
        moved.append((way * interval["mean"], min(way * interval["low"], way * interval["high"])))
    if all(low > 0 for _, low in moved):
        return "same"
    return "opposite" if any(mean < 0 for mean, _ in moved) else "no difference"


def _why(lines: list[dict[str, Any]]) -> str:
    def consistency(stage: str) -> str:
        shares = [line["temperature"]["consistency"] for line in _own(lines, stage)]
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"

    return (
        f"T moves as commanded for {consistency('after')} of the prompts after targeted training, by held-out command. "
        f"Before it: {consistency('before')} ({_sign(lines, 'before')}), so what emerges by itself is "
        f"{'there on average' if _sign(lines, 'before') == 'same' else 'not to be relied on'}."
    )


if __name__ == "__main__":
    main(EXPERIMENT, run)
