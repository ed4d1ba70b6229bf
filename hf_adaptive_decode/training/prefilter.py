"""Leaves out prompts that the base model always or never solves; knows rollouts' settings, no gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Subset

from .data import DataFormatError
from .reinforce_arguments import REINFORCEDecodingTrainingArguments
from .rollouts import RolloutMaker, score_groups


def prefiltered(
    maker: RolloutMaker, dataset: Any, args: REINFORCEDecodingTrainingArguments, accelerator: Accelerator
) -> tuple[Subset[dict[str, Any]], float]:
    """
    The prompts whose mean reward under plain sampling lies within `args.prefilter_range` (section 2.3), and what part
    of all they are.

    Sampled without a template, at the largest token budget; each process samples its share of the prompts. A prompt
    without a reward is left out.

    Raises:
        [`DataFormatError`]: If none is left.
    """
    numbers = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    rates = np.full(len(dataset), np.nan)
    for number, rate in gather_object(list(zip(numbers, _rates(maker, dataset, numbers, args), strict=True))):
        rates[number] = rate
    low, high = args.prefilter_range
    kept = np.flatnonzero((rates >= low) & (rates <= high)).tolist()  # NaN compares as outside
    if not kept:
        raise DataFormatError(
            f"none of {len(dataset)} prompts has a mean reward within `prefilter_range` = [{low}, {high}] over "
            f"`prefilter_samples` = {args.prefilter_samples}; widen the range, raise `budget`, or check the reward."
        )
    return Subset(dataset, kept), len(kept) / len(dataset)


def _rates(
    maker: RolloutMaker, dataset: Any, numbers: Sequence[int], args: REINFORCEDecodingTrainingArguments
) -> list[float]:
    """Mean rewards of some of the prompts, which do not depend on the others."""
    prompts = [dataset[number]["prompt"] for number in range(len(dataset))]
    engine = copy.copy(maker.engine)
    engine.model.eval()
    engine.batch_rows = args.rollout_batch_rows or 256
    engine.tokenizer = copy.copy(maker.engine.tokenizer)
    template = maker.engine.tokenizer.apply_chat_template
    engine.tokenizer.apply_chat_template = partial(template, **(maker.chat_template_kwargs or {}))
    with maker.lockstep.phase():
        completions = engine.complete(
            prompts,
            samples=args.prefilter_samples,
            token_budget=maker.drawer.largest_tokens,
            settings={"temperature": 1.0},
            seed=args.seed,
            only=numbers,
            description=None if args.disable_tqdm or args.process_index else "filtering prompts",
        )
    items, asked = [dataset[number] for number in numbers], [prompts[number] for number in numbers]
    rewards = score_groups(maker.rewards, asked, items, [one for group in completions for one in group])
    rates: list[float] = rewards.total.reshape(len(items), args.prefilter_samples).mean(axis=1).tolist()
    return rates
