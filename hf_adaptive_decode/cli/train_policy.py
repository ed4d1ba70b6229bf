"""`hf-adaptive-decode train-policy`: an action policy by REINFORCE, beside every baseline; knows no particular task."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.provenance import environment
from .comparison import show, update_cards
from .launched import is_main, may_compare
from .policy_flags import add_policy_arguments
from .policy_run import prior_entries, static_rates, train_policy_in
from .push import check_upload, upload
from .run_folder import RunFolder, digest
from .tasks import TESTBED, asked, check_chat, dataset_names, load_model, load_problems, reward_function
from .training_flags import FREE, check_trackers, trainer_settings

if TYPE_CHECKING:
    from ..evaluation import Evaluation

_FREE = FREE | {"log_completions", "twin"}
_FREE_WITHOUT_PRIOR = {"validation_problems", "eval_samples"}
# Of the trainer's arguments those that the command has flags for, by their names there.
_SAME = ["num_generations", "budget", "parallel_budget", "reward_aggregation", "baseline", "entropy_coef", "kl_coef"]
_SAME += ["cot_ratio", "cot_template", "prefilter_samples", "learning_rate", "rollout_batch_rows", "seed"]
_SAME += ["report_to", "log_completions", "rollout_engine"]
_OWN = {name: f"--{name.replace('_', '-')}" for name in [*_SAME, "max_prob_mask"]}
_OWN |= {"per_device_train_batch_size": "--prompts-per-step"}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task, the policy, its training and the comparison; the defaults are for the embedded model."""
    add_policy_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, saves and compares; returns what it printed as numbers."""
    from transformers import logging

    started = time.perf_counter()
    logging.set_verbosity_error()
    _check(args)
    actions, reward = _actions(args), reward_function(args.reward)
    problems = _problems(args)
    # All that may be wrong shows here, before a model is loaded.
    plans = [_plan(args, actions, problems, is_twin) for is_twin in ([False, True] if args.twin else [False])]
    model, tokenizer, policies = _train(args, plans, actions, reward, problems)
    may = bool(args.test_problems) and may_compare(model)
    found = _compare(args, model, tokenizer, problems, reward, actions, policies) if may else None
    _show(found, plans, args)
    url = upload(plans[0].run.adapter, args.push_to_hub, args) if args.push_to_hub and is_main() else None
    result: dict[str, Any] = {"lines": [] if found is None else found.lines, "actions": actions}
    result |= {"training": {plan.name: plan.run.record["log"] for plan in plans}}
    result |= {"priors": {name: group[0].config.action_prior for name, group in policies.items()}}
    seconds = time.perf_counter() - started
    return {**result, "url": url, "arguments": asked(args), "seconds": seconds, "environment": environment()}


def _train(
    args: argparse.Namespace, plans: Sequence[_Plan], actions: Any, reward: Any, problems: dict[str, list[Row]]
) -> tuple[Any, Any, dict[str, list[Any]]]:
    """A base model, its tokenizer, and the trained policies by name."""
    policies: dict[str, list[Any]] = {}
    rates: list[Any] = []
    for plan in plans:
        # A base has one adapter, so each policy is trained on a base of its own.
        model, tokenizer = load_model(args)
        check_chat(args, tokenizer)

        def config(plan: _Plan = plan, model: Any = model, tokenizer: Any = tokenizer) -> Any:
            if args.prior is not None and not rates:
                rates.append(_rates(args, model, tokenizer, problems["validation"], reward, actions))
            return plan.config(rates[0] if rates else None)

        how = {"arguments": plan.arguments, "deterministic": args.deterministic, "source": dataset_names(args)}
        policy = train_policy_in(plan.run, model, tokenizer, config, reward=reward, problems=problems["train"], **how)
        policies[plan.name] = [policy]
    return model, tokenizer, policies


def _check(args: argparse.Namespace) -> None:
    check_trackers(args.report_to)
    check_upload(args)
    measures = bool(args.test_problems) or args.prior is not None
    if measures and args.eval_samples < max(args.parallel_budget):
        raise ValueError(
            f"--eval-samples is {args.eval_samples} and --parallel-budget goes up to {max(args.parallel_budget)}; what "
            "B samples reach is seen on at least B of them."
        )
    if args.prior is not None and not 0 < args.prior <= 1:
        raise ValueError(f"--prior is {args.prior}; it has to be a probability above 0 and up to 1.")
    if "none" in (args.told or []) and len(args.told) > 1:
        raise ValueError(f"--told is {' '.join(args.told)}; `none` stands alone.")
    if args.twin and args.told == ["none"]:
        raise ValueError("--twin is the policy that is not told the budget, and --told none is that already.")


def _actions(args: argparse.Namespace) -> list[dict[str, float]]:
    """The actions that `--actions` names, lists or is a file of."""
    from ..actions import ACTION_PRESETS

    words = args.actions or ["token_math" if args.policy == "token_actions" else "math"]
    if len(words) == 1 and words[0] in ACTION_PRESETS:
        return [dict(action) for action in ACTION_PRESETS[words[0]]]
    if len(words) == 1 and Path(words[0]).suffix == ".json":
        try:
            found: list[dict[str, float]] = json.loads(Path(words[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--actions {words[0]} cannot be read: {error}") from error
        return found
    try:
        return [{"temperature": float(word)} for word in words]
    except ValueError as error:
        raise ValueError(
            f"--actions is {' '.join(words)}; it has to be one of {', '.join(ACTION_PRESETS)}, a .json file with a "
            "list of sampling configurations, or temperatures."
        ) from error


def _problems(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of each split that is needed."""
    wanted: dict[str, int | None] = {"train": args.train_problems}
    if args.test_problems or args.prior is not None:
        wanted["validation"] = args.validation_problems
    if args.test_problems:
        wanted["test"] = args.test_problems
    return {split: load_problems(args, split, count, args.seed, chat=args.chat) for split, count in wanted.items()}


@dataclass(frozen=True)
class _Plan:
    """One policy to train: its name in tables, where it goes, how it is trained, and its config by a prior's rates."""

    name: str
    run: RunFolder
    arguments: Any
    config: Callable[[Any], Any]


def _plan(
    args: argparse.Namespace, actions: list[dict[str, float]], problems: dict[str, list[Row]], is_twin: bool
) -> _Plan:
    from ..configuration import AutoDecoConfig

    told = [] if is_twin or args.told == ["none"] else args.told
    fresh = AutoDecoConfig(
        policy=args.policy,
        actions=actions,
        features=args.features,
        budget_features=told,
        pooling=args.pooling,
        max_token_budget=args.max_token_budget or max(2, *args.budget),
        max_parallel_budget=args.max_parallel_budget or max(2, *args.parallel_budget),
        policy_hidden_size=args.hidden_size,
        policy_dropout=args.dropout,
    )

    def config(rates: Any) -> AutoDecoConfig:
        if rates is not None:
            told_samples = "samples" in fresh.budget_features
            fresh.action_prior = prior_entries(rates, sorted(set(args.parallel_budget)), args.prior, told_samples)
        return fresh

    folder = Path(args.output, "twin") if is_twin else Path(args.output)
    free = _FREE if args.prior is not None else _FREE | _FREE_WITHOUT_PRIOR
    record = {name: value for name, value in vars(args).items() if name not in free}
    used = {split: rows for split, rows in problems.items() if split == "train" or (split != "test" and args.prior)}
    record |= {"actions": actions, "told": fresh.budget_features, "problems": digest([used])}
    kind = "token" if args.policy == "token_actions" else "prompt"
    name = "its twin, not told the budget" if is_twin else f"learned {kind} policy"
    run_folder = RunFolder(folder, json.loads(json.dumps(record)), args.resume)
    return _Plan(name, run_folder, _trainer_arguments(args, folder), config)


def _trainer_arguments(args: argparse.Namespace, folder: Path) -> Any:
    import torch

    from ..training import REINFORCEDecodingTrainingArguments

    how = {
        "output_dir": str(folder / "training"),
        "per_device_train_batch_size": args.prompts_per_step,
        "max_steps": args.steps,
        "max_prob_mask": args.max_prob_mask or None,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or args.steps,
        "save_total_limit": 2,
        "logging_steps": max(1, args.steps // 20),
        "disable_tqdm": False,
        "use_cpu": args.model == TESTBED or not torch.cuda.is_available(),
        **{name: vars(args)[name] for name in _SAME},
        **trainer_settings(REINFORCEDecodingTrainingArguments, args.set, _OWN),
    }
    return REINFORCEDecodingTrainingArguments(**how)


def _rates(args: argparse.Namespace, model: Any, tokenizer: Any, problems: Any, reward: Any, actions: Any) -> Any:
    budgets, parallel = sorted(set(args.budget)), sorted(set(args.parallel_budget))
    how = {"samples": args.eval_samples, "seed": args.seed, "batch_rows": args.eval_batch_rows}
    asked = _as_asked(args, problems)
    return static_rates(model, tokenizer, asked, reward, actions, budgets, parallel, **how)


def _as_asked(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """The rows with the text that training adds to prompts, in the same parts."""
    from ..training.prompts import Drawer

    drawer = Drawer(args.budget, args.parallel_budget, args.cot_ratio, args.cot_template, args.seed)
    # No training step has this number.
    return [row | {"prompt": drawer.draw(index, -1, row["prompt"]).prompt} for index, row in enumerate(rows)]


def _compare(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    problems: dict[str, list[Row]],
    reward: Any,
    actions: list[dict[str, float]],
    policies: dict[str, list[Any]],
) -> Evaluation:
    """The policy, its twin if there is one, and every baseline on the test problems."""
    from ..actions import describe
    from ..evaluation import Task, evaluate_decoding
    from ..evaluation.baselines import STATIC_GRID
    from ..evaluation.tasks import read_testbed_answer

    # Every action is a static as well, and one of them might be the best.
    known = {"greedy", *map(describe, STATIC_GRID)}
    grid = [*STATIC_GRID, *(action for action in actions if describe(action) not in known)]
    rows = {split: _as_asked(args, problems[split]) for split in ("validation", "test")}
    answer = read_testbed_answer if args.reward == TESTBED else None
    main, *others = policies
    return evaluate_decoding(
        model,
        tokenizer,
        Task(dataset_names(args), **rows, reward=reward, answer=answer),
        {main: policies[main]},
        rivals={name: policies[name] for name in others},
        samples=args.eval_samples,
        ks=args.parallel_budget,
        token_budgets=args.budget,
        seeds=(args.seed,),
        grid=grid,
        folder=Path(args.output, "evaluation"),
        batch_rows=args.eval_batch_rows,
    )


def _show(found: Evaluation | None, plans: Sequence[_Plan], args: argparse.Namespace) -> None:
    if found is not None:
        update_cards(found, {plans[0].name: [plans[0].run.adapter]})
        size = f"{args.test_problems} test problems, {args.eval_samples} samples each"
        show(found, size, Path(args.output, "evaluation"))
    for plan in plans:
        line = f"AutoDecoForCausalLM.from_pretrained({str(plan.run.adapter)!r})"
        print(f"\nLoad it in one line ({plan.name}): {line}")
