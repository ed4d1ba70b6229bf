"""Sets up the training of decoding heads, and the verified solutions that they learn from; knows no flags and no
particular task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .run_folder import write_whole

# What the heads of the testbed were trained with, each chosen on validation problems: there the paper's weighting holds
# the heads back at the forks.
RECIPE: dict[str, Any] = {
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "dft_weight": "off",
    "easy_token_mask_ratio": 0.6,
}
# What stands beside the progress bar.
SHOWN = ("loss", "temperature_mean", "top_p_mean")


def heads_arguments(output_dir: str | Path, paper: bool = False, **changed: Any) -> Any:
    """
    Arguments for the training of heads: the testbed's recipe, or the AutoDeco paper's (section 6).

    Args:
        output_dir (`str` or `Path`): Where checkpoints go.
        paper (`bool`): Whether to begin with the paper's.
        changed: Whatever is to be otherwise.

    Returns:
        [`AutoDecoTrainingArguments`]: On the GPU if there is one; nothing is saved or reported unless asked for.
    """
    import torch

    from ..training import AutoDecoTrainingArguments

    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": False}
    how = {**quiet, "use_cpu": not torch.cuda.is_available(), **({} if paper else RECIPE), **changed}
    steps = how.get("max_steps", 400)
    # Below 1 it is a part of the steps, which are not known where epochs are asked for.
    how.setdefault("logging_steps", max(1, steps // 20) if steps > 0 else 0.05)
    if paper:
        return AutoDecoTrainingArguments.autodeco_paper(str(output_dir), **how)
    return AutoDecoTrainingArguments(output_dir=str(output_dir), **how)


def heads_trainer(
    base: Any, tokenizer: Any, rows: Any, arguments: Any, config: Any = None, lora_rank: int | None = None
) -> Any:
    """
    A trainer of fresh heads on a base model; the same seed gives the same heads.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, which becomes an adaptive one.
        tokenizer: Its tokenizer.
        rows (data set or sequence of `dict`): In any format that [`AutoDecoTrainer`] takes.
        arguments ([`AutoDecoTrainingArguments`]): How to train.
        config ([`AutoDecoConfig`], *optional*): Of the heads.
        lora_rank (`int`, *optional*): Of a LoRA that is put into the base, to be trained where `arguments` say so.
    """
    import torch

    from ..configuration import AutoDecoConfig
    from ..modeling import AutoDecoForCausalLM
    from ..training import AutoDecoTrainer

    torch.manual_seed(arguments.seed)  # for the fresh heads; the Trainer seeds what follows
    if lora_rank is not None:
        base = _with_lora(base, lora_rank)
    model = AutoDecoForCausalLM.from_base(base, config or AutoDecoConfig(policy="heads"))
    return AutoDecoTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)


def _with_lora(base: Any, rank: int) -> Any:
    """The base model with a fresh LoRA in every linear layer but the output's, which changes nothing yet."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, settings)


def solutions(
    path: Path | None,
    model: Any,
    tokenizer: Any,
    problems: Sequence[Mapping[str, Any]],
    reward: Callable[..., Any],
    **how: Any,
) -> list[dict[str, list[int]]]:
    """
    The base model's own verified solutions, sampled once and then read from a file.

    Args:
        path (`Path`, *optional*): The file, JSON Lines. What it depends on belongs into its name.
        model, tokenizer, problems, reward, how: As [`verified_completions`] takes them.

    Raises:
        `ValueError`: If none of the problems was solved.
    """
    from ..evaluation.store import CompletionStore
    from ..training.rejection import verified_completions

    if path is not None and path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    store = None if path is None else CompletionStore(drawn_file(path))
    rows = verified_completions(model, tokenizer, problems, reward, store=store, **how)
    if not rows:
        raise ValueError(
            f"none of {len(problems)} problems was solved within {how.get('token_budget', 256)} tokens, so there is "
            "nothing to learn from; check the reward and how problems are asked, raise the token budget or the "
            "samples, or train on text that is there."
        )
    if path is not None:
        write_whole(path, (json.dumps(row) + "\n" for row in rows))
        drawn_file(path).unlink(missing_ok=True)
    return rows


def drawn_file(path: Path) -> Path:
    """Where `solutions` keeps what it samples until its own file is there, so that a killed run goes on."""
    return path.with_name(f".{path.stem}-drawn.jsonl")


def with_command_ids(
    rows: Sequence[Mapping[str, Any]],
    problems: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    commands: Any,
    seed: int,
) -> list[dict[str, Any]]:
    """
    Sampled solutions with their prompts under commands for less and for more diversity, `low_prompt_ids` and
    `high_prompt_ids`.

    Args:
        rows (sequence of mappings): `input_ids` and `labels`, −100 on the prompt.
        problems (sequence of mappings): With the prompts that they are solutions of.
        tokenizer: The base model's.
        commands ([`CommandSet`]): What to draw from.
        seed (`int`): Seeds the draws.
    """
    from ..engines.transformers import encode_prompt
    from ..losses import IGNORE_INDEX
    from ..training import with_commands

    prompts = {tuple(encode_prompt(tokenizer, row["prompt"])): row["prompt"] for row in problems}
    heads = [tuple(row["input_ids"][: list(row["labels"]).count(IGNORE_INDEX)]) for row in rows]
    told = with_commands([{"prompt": prompts[head]} for head in heads], commands, seed)
    return [
        {**row, **{f"{way}_prompt_ids": encode_prompt(tokenizer, one[f"{way}_prompt"]) for way in ("low", "high")}}
        for row, one in zip(rows, told, strict=True)
    ]
