"""Training text from the base model itself: samples solutions and keeps verified ones; knows nothing of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..engines.base import Completion
from ..engines.transformers import complete, encode_prompt
from ..evaluation.runner import Reward, score
from ..losses import IGNORE_INDEX

# From cold to hot: greedy first, plain sampling last.
LADDER: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0})


def verified_completions(
    model: PreTrainedModel,
    tokenizer: Any,
    problems: Sequence[Mapping[str, Any]],
    reward: Reward,
    *,
    samples: int = 4,
    keep: int = 2,
    token_budget: int = 256,
    ladder: Sequence[Mapping[str, float]] = LADDER,
    seed: int = 0,
    batch_rows: int = 256,
    show_progress: bool = True,
) -> list[dict[str, list[int]]]:
    """
    Rejection-sampled solutions (AutoDeco, section 3.1), each problem's from the coldest setting that solves it.

    A solution sampled hotter than its problem needs holds slips that happened not to matter, and heads trained on it
    learn to allow them. So a problem moves on to the next setting of `ladder` only if none of its samples was right.

    Args:
        model, tokenizer: The base model and its tokenizer.
        problems (sequence of mappings): Rows with a `prompt` and the reward's columns.
        reward (`Callable`): In TRL's signature; a completion that earns at least 1 is kept.
        samples (`int`): Completions drawn of a problem at each setting.
        keep (`int`): How many right ones to keep of a problem.
        token_budget, seed, batch_rows, show_progress: As for sampling.
        ladder (sequence of mappings): Static settings, from cold to hot.

    Returns:
        Rows of `input_ids` and `labels` (−100 on the prompt) for [`AutoDecoTrainer`].
    """
    rows: list[dict[str, list[int]]] = []
    open_problems = list(problems)
    for rung, settings in enumerate(ladder):
        if not open_problems:
            break
        groups = complete(
            model,
            tokenizer,
            [row["prompt"] for row in open_problems],
            samples=1 if settings.get("temperature") == 0 else samples,
            token_budget=token_budget,
            settings=settings,
            seed=seed + rung,
            batch_rows=batch_rows,
            description=f"solutions at T={settings.get('temperature', 1.0):g}" if show_progress else None,
        )
        right = score(groups, open_problems, reward) >= 1.0
        for row, group, good in zip(open_problems, groups, right, strict=True):
            chosen = [one for one, is_right in zip(group, good, strict=True) if is_right and one.ended]
            rows += [_row(tokenizer, row["prompt"], one) for one in chosen[:keep]]
        open_problems = [row for row, good in zip(open_problems, right, strict=True) if not good.any()]
    return rows


def _row(tokenizer: Any, prompt: Any, completion: Completion) -> dict[str, list[int]]:
    head, ids = encode_prompt(tokenizer, prompt), list(completion.token_ids)
    return {"input_ids": head + ids, "labels": [IGNORE_INDEX] * len(head) + ids}
