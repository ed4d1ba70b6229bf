"""
Action policies on the embedded testbed, over several training seeds, beside twins, ablations and every baseline.

    python examples/policies_on_testbed.py token
    python examples/policies_on_testbed.py budget
    python examples/policies_on_testbed.py sequence
    python examples/policies_on_testbed.py one_policy --base OTHER_BASE

A base model of another seed comes from `python -m hf_adaptive_decode.testbed.train --seed 1 --output OTHER_BASE`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.evaluation import evaluate_decoding, load_task
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

TEMPERATURES = [{"temperature": t} for t in (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)]
# For a whole completion, where heat needs a nucleus.
SEQUENCE = [
    *({"temperature": t} for t in (0.0, 0.5, 0.75, 1.0, 1.25)),
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.25, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.8},
]
# What best statics are chosen from, greedy aside.
GRID = [{"temperature": t, "top_p": p} for t in (0.5, 0.75, 1.0, 1.25, 1.5) for p in (0.8, 0.9, 1.0)]


@dataclass(frozen=True)
class Experiment:
    """One policy, how it is trained, and variants of it by name: the settings that they change."""

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    budgets: tuple[int, ...]
    parallel: tuple[int, ...] = (1,)
    samples: int = 8
    steps: int = 60
    entropy: float = 0.01
    aggregation: str = "mean"


TOKEN = {"policy": "token_actions", "actions": TEMPERATURES, "max_token_budget": 64, "max_parallel_budget": 8}
EXPERIMENTS = {
    "token": Experiment(
        TOKEN,
        {"token policy": {}, "entropy alone": {"features": ["entropy"]}},
        budgets=(48,),
    ),
    "budget": Experiment(
        TOKEN,
        {"token policy, told b_t": {}, "twin, not told": {"budget_features": []}},
        budgets=(6, 12, 24),
        steps=100,
        entropy=0.03,
    ),
    "sequence": Experiment(
        {**TOKEN, "policy": "sequence_actions", "actions": SEQUENCE},
        {"prompt policy, told B": {}, "twin, not told": {"budget_features": []}},
        budgets=(28,),
        parallel=(1, 2, 4, 8),
        samples=16,
        steps=150,
        aggregation="pass@B",
    ),
    "one_policy": Experiment(
        {**TOKEN, "budget_features": ["tokens", "samples"]},
        {"token policy, told b_t and B": {}, "twin, told b_t alone": {"budget_features": ["tokens"]}},
        budgets=(12, 28, 48),
        parallel=(1, 2, 4, 8),
        samples=16,
        steps=150,
        entropy=0.03,
        aggregation="pass@B",
    ),
}


def train(base: Any, tokenizer: Any, experiment: Experiment, settings: dict[str, Any], seed: int, steps: int) -> Any:
    """One policy, trained with one seed; the base is as before afterwards."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = REINFORCEDecodingTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=96,
            num_generations=experiment.samples,
            budget=list(experiment.budgets),
            parallel_budget=list(experiment.parallel),
            reward_aggregation=experiment.aggregation,
            entropy_coef=experiment.entropy,
            learning_rate=5e-3,
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            logging_steps=max(1, steps // 5),
        )
        model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(**{**experiment.config, **settings}))
        problems = build_problems("train", 4000)
        trainer = REINFORCEDecodingTrainer(model, testbed_reward, args, problems, processing_class=tokenizer)
        trainer.train()
        return model.decoding_adapter.eval()


def main() -> None:
    """Trains every variant with every seed, and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--base", help="folder of another base model of the testbed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--first-variant-only", action="store_true", help="without twins and ablations")
    parser.add_argument("--steps", type=int, help="updates, instead of the experiment's own number")
    parser.add_argument("--validation-problems", type=int, default=400)
    parser.add_argument("--test-problems", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="where the result goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    started = time.perf_counter()
    experiment = EXPERIMENTS[options.experiment]
    if options.first_variant_only:
        experiment = replace(experiment, variants=dict(list(experiment.variants.items())[:1]))

    def base() -> Any:
        return load_base_model() if options.base is None else AutoModelForCausalLM.from_pretrained(options.base).eval()

    tokenizer = load_tokenizer()
    policies = {
        name: [
            train(base(), tokenizer, experiment, settings, seed, options.steps or experiment.steps)
            for seed in options.seeds
        ]
        for name, settings in experiment.variants.items()
    }
    main_policy, *others = policies
    found = evaluate_decoding(
        base(),
        tokenizer,
        load_task("testbed", validation=options.validation_problems, test=options.test_problems),
        {main_policy: policies[main_policy]},
        rivals={name: policies[name] for name in others},
        samples=8,
        ks=experiment.parallel,
        token_budgets=experiment.budgets,
        grid=GRID,
        batch_rows=2048,
    )
    arguments = {name: value for name, value in vars(options).items() if name not in ("output", "base")}
    facts = {"arguments": arguments, "settings": asdict(experiment)}
    facts |= {"base": "shipped" if options.base is None else Path(options.base).name}
    found.lines[0] |= {**facts, "seconds": time.perf_counter() - started}
    print(f"{found.table()}\n\n{found.summary()}")
    if options.output is not None:
        found.save(options.output)


if __name__ == "__main__":
    main()
