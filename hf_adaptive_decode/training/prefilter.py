"""Leaves out prompts that the base model always or never solves; knows rollouts' settings, no gradients."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Subset

from .data import DataFormatError
from .reinforce_arguments import REINFORCEDecodingTrainingArguments
from .rollouts import RolloutMaker, score_groups


def prefiltered(
    maker: RolloutMaker, dataset: Any, args: REINFORCEDecodingTrainingArguments
) -> tuple[Subset[dict[str, Any]], float]:
    """
    The prompts whose mean reward under plain sampling lies within `args.prefilter_range` (section 2.3), and what part
    of all they are.

    Sampled without a template, at the largest token budget. A prompt without a reward is left out.

    Raises:
        [`DataFormatError`]: If none is left.
    """
    items = [dataset[index] for index in range(len(dataset))]
    prompts = [item["prompt"] for item in items]
    samples = args.prefilter_samples
    engine = copy.copy(maker.engine)
    engine.model.eval()
    engine.batch_rows = args.rollout_batch_rows or 256
    engine.tokenizer = copy.copy(maker.engine.tokenizer)
    template = maker.engine.tokenizer.apply_chat_template
    engine.tokenizer.apply_chat_template = partial(template, **(maker.chat_template_kwargs or {}))
    completions = engine.complete(
        prompts,
        samples=samples,
        token_budget=maker.drawer.largest_tokens,
        settings={"temperature": 1.0},
        seed=args.seed,
        description=None if args.disable_tqdm else "filtering prompts",
    )
    flat = [one for group in completions for one in group]
    rewards = score_groups(maker.rewards, prompts, items, flat)
    rates = rewards.total.reshape(len(items), samples).mean(axis=1)  # NaN compares as outside
    low, high = args.prefilter_range
    kept = np.flatnonzero((rates >= low) & (rates <= high)).tolist()
    if not kept:
        raise DataFormatError(
            f"none of {len(items)} prompts has a mean reward within `prefilter_range` = [{low}, {high}] over "
            f"`prefilter_samples` = {samples}; widen the range, raise `budget`, or check the reward."
        )
    return Subset(dataset, kept), len(kept) / len(items)
