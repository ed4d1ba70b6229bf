"""`hf-adaptive-decode train-heads`: temperature and top-p heads on text or on verified solutions; knows no particular
task.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..evaluation.provenance import environment
from .comparison import baselines_of, show, update_cards
from .heads_flags import LATER, OF_RECIPE, OWN, add_heads_arguments, control_commands, heads_settings
from .heads_run import SHOWN, drawn_file, heads_arguments, heads_trainer, solutions, with_command_ids
from .launched import is_main, main_first, may_compare
from .push import check_upload, upload
from .run_folder import RunFolder, digest, train_in
from .tasks import TESTBED, asked, check_chat, dataset_names, load_model, load_problems, reward_function, tasks_of
from .texts import load_texts
from .training_flags import FREE, check_trackers, trainer_settings

NAME = "learned heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The data, the heads, their training and the comparison; the defaults are for the embedded model."""
    add_heads_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, saves, and compares and uploads if asked to; returns what it printed as numbers."""
    from transformers import logging

    started = time.perf_counter()
    logging.set_verbosity_error()
    _check(args)
    # All that may be wrong shows here, before a model is loaded.
    arguments, config = _arguments(args), _config(args)
    data = _Data(args)
    tasks = _tasks(args) if args.evaluate else []
    record = {name: value for name, value in vars(args).items() if name not in FREE | LATER}
    folder = RunFolder(Path(args.output), json.loads(json.dumps(record | {"data": data.digest})), args.resume)
    model, tokenizer = load_model(args)
    check_chat(args, tokenizer)

    def make_trainer() -> Any:
        with main_first(arguments):
            rows = data.rows(args, model, tokenizer)
        print(f"{len(rows):,} examples to train on{data.note}")
        trainer = heads_trainer(model, tokenizer, rows, arguments, config, args.lora_rank)
        trainer.model.print_trainable_parameters()
        return trainer

    policy = train_in(folder, model, make_trainer, shown=SHOWN, data=data.described)
    may = bool(tasks) and may_compare(model)
    found = _compare(args, model, tokenizer, tasks, policy, folder.adapter) if may else None
    print(f"\nLoad it in one line: AutoDecoForCausalLM.from_pretrained({str(folder.adapter)!r})")
    url = upload(folder.adapter, args.push_to_hub, args) if args.push_to_hub and is_main() else None
    return {
        "lines": [] if found is None else found.lines,
        "training": {NAME: folder.record["log"]},
        "adapter": str(folder.adapter),
        "url": url,
        "arguments": asked(args),
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }


def _check(args: argparse.Namespace) -> None:
    from ..evaluation.controls import check_names

    check_trackers(args.report_to)
    check_upload(args)
    check_names(baselines_of(args.baselines))
    problems = {entry.partition(":")[0] == TESTBED for entry in args.dataset}
    if args.sample is None:
        args.sample = problems == {True}
    has_reward = args.reward != TESTBED or problems == {True}
    if args.sample and not has_reward:
        raise ValueError(
            f"--sample needs --reward, which tells the right solutions to the problems of {' '.join(args.dataset)} "
            "from the others."
        )
    if args.evaluate and not args.task and not has_reward:
        raise ValueError(
            f"--evaluate needs problems with a reward: pass --task, or --reward if those of {' '.join(args.dataset)} "
            "have solutions."
        )
    if args.lora_learning_rate is not None and args.lora_rank is None:
        raise ValueError("--lora-learning-rate is without effect where there is no LoRA; pass --lora-rank.")
    if args.control_commands is not None and not args.control_loss_weight:
        raise ValueError("--control-commands is without effect at --control-loss-weight 0; raise that.")


def _arguments(args: argparse.Namespace) -> Any:
    """The trainer's: those of the recipe, but for what flags say otherwise."""
    import torch

    from ..training import AutoDecoTrainingArguments

    how: dict[str, Any] = {
        "control_commands": control_commands(args),
        "use_cpu": args.model == TESTBED or not torch.cuda.is_available(),
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        "save_total_limit": 2,
        "report_to": args.report_to,
        "seed": args.seed,
    }
    how |= {field: value for name, field in OF_RECIPE.items() if (value := vars(args)[name]) is not None}
    how |= {} if args.lora_rank is None else {"train_peft": True, "peft_learning_rate": args.lora_learning_rate}
    if args.epochs is not None:
        how |= {"num_train_epochs": args.epochs, "max_steps": -1}
    how |= trainer_settings(AutoDecoTrainingArguments, args.set, OWN)
    return heads_arguments(Path(args.output, "training"), paper=args.recipe == "paper", **how)


def _config(args: argparse.Namespace) -> Any:
    from ..configuration import AutoDecoConfig

    return AutoDecoConfig(policy="heads", **heads_settings(args))


class _Data:
    """What is to be trained on: texts as they are, or problems whose solutions the model samples."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sampled, self.used, self.name = args.sample, 0, dataset_names(args)
        if args.sample:
            count = args.train_problems or (1500 if args.dataset == [TESTBED] else None)
            self.problems = load_problems(args, "train", count, args.seed, chat=args.chat)
            self.reward = reward_function(args.reward)
            self.digest = digest(self.problems)
            self.note = f", the model's own solutions to {len(self.problems):,} problems"
        else:
            texts = load_texts(args)
            self.texts, self.digest, self.note = texts.rows, digest(texts.rows), texts.note

    def described(self) -> str:
        """For the card."""
        if self.sampled:
            return f"{self.used:,} solutions of its own to {len(self.problems):,} problems of {self.name}, verified"
        return f"{self.used:,} texts of {self.name}"

    def rows(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
        """Rows in a format that the trainer takes."""
        rows = self._solutions(args, model, tokenizer) if self.sampled else self.texts
        self.used = len(rows)
        return rows

    def _solutions(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        how = {"samples": args.num_generations, "keep": args.keep, "token_budget": max(args.budget), "seed": args.seed}
        made_of = digest([self.digest, args.model, args.reward, how])[:8]
        path = Path(args.output, "training", f"solutions-{made_of}.jsonl")
        if not args.resume and is_main():
            path.unlink(missing_ok=True)
            drawn_file(path).unlink(missing_ok=True)
        how |= {"batch_rows": args.rollout_batch_rows}
        rows = solutions(path, model, tokenizer, self.problems, self.reward, **how)
        commands = control_commands(args)
        if commands is None:
            return rows
        from ..training import CommandSet

        return with_command_ids(rows, self.problems, tokenizer, CommandSet.read(commands), args.seed)


def _tasks(args: argparse.Namespace) -> list[Any]:
    """What to measure on: the tasks that are named, or the problems of the data set that are not trained on."""
    if args.task:
        return tasks_of(args, args.task, [])
    return tasks_of(args, [], args.dataset, args.prompt_template)


def _compare(args: argparse.Namespace, model: Any, tokenizer: Any, tasks: list[Any], policy: Any, adapter: Path) -> Any:
    from ..evaluation import evaluate_decoding

    folder = Path(args.output, "evaluation")
    found = evaluate_decoding(
        model,
        tokenizer,
        tasks,
        {NAME: [policy]},
        baselines=baselines_of(args.baselines),
        samples=args.eval_samples,
        token_budgets=args.budget,
        seeds=(args.seed,),
        folder=folder,
        batch_rows=args.eval_batch_rows,
    )
    update_cards(found, {NAME: [adapter]})
    show(found, f"Up to {args.test_problems} test problems, {args.eval_samples} samples each", folder)
    return found
