"""A batch of prompts, decoded and rewarded; knows engines, rewards and credit, nothing of gradients or trainers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ..engines.base import Completion
from ..engines.engine import Engine
from ..engines.lockstep import Lockstep
from ..engines.prompts import encode_prompt
from ..engines.records import Decisions, Rows
from ..policies.action_policy import ActionPolicy
from ..randomness import row_key
from ..rewards.calls import RewardFunctions, Rewards
from .credit import group_value
from .prompts import Draw, Drawer, PromptDataset

Item = dict[str, Any]  # index, prompt, columns
AnswerOf = Callable[[str], Hashable]


@dataclass(frozen=True)
class Rollout:
    """
    What a batch of `G` prompts brought, `n` completions of each.

    Args:
        items (list of `dict`), draws (list of [`Draw`]): The prompts, and what each was given.
        completions (list of [`Completion`]): `G · n`, prompt by prompt.
        decisions ([`Decisions`], *optional*): Of all rows; `None` if the policy never decided.
        rewards ([`Rewards`]): Of all completions.
        table (`np.ndarray` of shape `[G, n]`, `float64`): Total rewards.
        parallel (`np.ndarray` of shape `[G]`, `int64`): B.
        kept (`np.ndarray` of shape `[G]`, `bool`): Prompts to learn from.
        value (`np.ndarray` of shape `[G]`, `float64`): What B samples are worth, NaN where a reward is missing.
        scores, answers: What the aggregation needs besides.
    """

    items: list[Item]
    draws: list[Draw]
    completions: list[Completion]
    decisions: Decisions | None
    rewards: Rewards
    table: np.ndarray
    parallel: np.ndarray
    kept: np.ndarray
    value: np.ndarray
    scores: np.ndarray | None
    answers: list[list[Hashable]] | None


class RolloutMaker:
    """
    Decodes and rewards batches; a completion's draws depend on its prompt's index, the step and its own number alone.

    Args:
        engine ([`Engine`]): Decodes, by the policy as it is at each call.
        rewards ([`RewardFunctions`]): The rewards.
        drawer ([`Drawer`]): Decides budgets and templates.
        samples (`int`): Completions of each prompt.
        aggregation (`str`): As [`~training.credit.credit`] takes it.
        scorer ([`RewardFunctions`], *optional*), answer_of (`Callable`, *optional*): For `"best_of"`, `"majority"`.
        drop_equal (`bool`): Whether prompts whose samples, if several, all earned the same are not kept.
        chat_template_kwargs (`dict`, *optional*): For conversational prompts.
        seed (`int`): For other draws.

    Attributes:
        lockstep ([`Lockstep`]): That of a model which is parted over processes; they have to roll out together.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardFunctions,
        drawer: Drawer,
        *,
        samples: int,
        aggregation: str = "mean",
        scorer: RewardFunctions | None = None,
        answer_of: AnswerOf | None = None,
        drop_equal: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.engine, self.rewards, self.drawer = engine, rewards, drawer
        self.samples, self.aggregation, self.scorer, self.answer_of = samples, aggregation, scorer, answer_of
        self.drop_equal, self.chat_template_kwargs, self.seed = drop_equal, chat_template_kwargs, seed
        self.lockstep = Lockstep()

    def roll_out(
        self, policy: ActionPolicy, items: Sequence[Item], step: int, trainer_state: Any = None, explores: bool = False
    ) -> Rollout:
        """Decodes and rewards one batch, the policy in evaluation mode; exploring, it always draws its actions."""
        draws = [self.drawer.draw(item["index"], step, item["prompt"]) for item in items]
        was_training, deterministic = policy.training, policy.deterministic
        policy.eval()
        policy.deterministic = deterministic and not explores
        try:
            with self.lockstep.phase():
                completions, decisions = self._decode(policy, items, draws, step)
        finally:
            policy.train(was_training)
            policy.deterministic = deterministic
        shape = (len(items), self.samples)
        asked = [draw.prompt for draw in draws]
        rewards = score_groups(self.rewards, asked, items, completions, trainer_state)
        table = rewards.total.reshape(shape)
        scores = answers = None
        if self.aggregation == "best_of":
            scorer = cast(RewardFunctions, self.scorer)
            scores = score_groups(scorer, asked, items, completions, trainer_state).total.reshape(shape)
        if self.aggregation == "majority":
            answer_of = cast(AnswerOf, self.answer_of)
            found = [answer_of(one.text) for one in completions]
            answers = [found[i : i + self.samples] for i in range(0, len(found), self.samples)]
        parallel = np.array([draw.samples for draw in draws])
        known = np.isfinite(table).all(axis=1) & (True if scores is None else ~np.isnan(scores).any(axis=1))
        value = np.full(len(items), np.nan)
        if known.any():
            value[known] = group_value(table[known], *self.of_groups(known, parallel, scores, answers))
        drops = self.drop_equal and self.samples > 1
        kept = known & (table != table[:, :1]).any(axis=1) if drops else known
        return Rollout(
            list(items), draws, completions, decisions, rewards, table, parallel, kept, value, scores, answers
        )

    def of_groups(
        self, which: np.ndarray, parallel: np.ndarray, scores: np.ndarray | None, answers: list[Any] | None
    ) -> tuple[np.ndarray, str, np.ndarray | None, list[Any] | None]:
        """The arguments of [`~training.credit.credit`] after the rewards, for some of the groups."""
        # What one sample is worth has no B, and a policy may be told a B above the samples that training draws.
        parallel = np.ones_like(parallel) if self.aggregation == "mean" else parallel
        chosen = None if answers is None else [group for group, take in zip(answers, which, strict=True) if take]
        return parallel[which], self.aggregation, None if scores is None else scores[which], chosen

    def _decode(
        self, policy: ActionPolicy, items: Sequence[Item], draws: Sequence[Draw], step: int
    ) -> tuple[list[Completion], Decisions | None]:
        if not items:
            return [], None
        encoded = [encode_prompt(self.engine.tokenizer, draw.prompt, self.chat_template_kwargs) for draw in draws]
        device = self.engine.model.device
        prompt = torch.arange(len(items), device=device).repeat_interleave(self.samples)
        names = [(item["index"], sample) for item in items for sample in range(self.samples)]
        rows = Rows(
            encoded,
            prompt,
            torch.tensor([draw.tokens for draw in draws], device=device)[prompt],
            torch.tensor([draw.samples for draw in draws], device=device)[prompt],
            torch.tensor([row_key(self.seed, step, *name) for name in names], device=device),
        )
        return self.engine.roll_out(policy, rows)


def score_groups(
    rewards: RewardFunctions,
    prompts: Sequence[Any],
    items: Sequence[Item],
    completions: Sequence[Completion],
    trainer_state: Any = None,
) -> Rewards:
    """Rewards of completions that lie prompt by prompt; `prompts` are the items' as they were asked."""
    if not items:
        return rewards([], [], [], {}, trainer_state=trainer_state)
    samples = len(completions) // len(items)
    owner = [group for group in range(len(items)) for _ in range(samples)]
    plain = [isinstance(prompt, str) for prompt in prompts]
    names = items[0]["columns"]
    return rewards(
        prompts=[prompts[group] for group in owner],
        completions=[
            one.text if plain[group] else [{"role": "assistant", "content": one.text}]
            for group, one in zip(owner, completions, strict=True)
        ],
        completion_ids=[list(one.token_ids) for one in completions],
        columns={name: [items[group]["columns"][name] for group in owner] for name in names},
        groups=[items[group]["index"] for group in owner],
        trainer_state=trainer_state,
    )


def evaluation_sets(dataset: Any) -> Any:
    """Data sets to evaluate on, as prompts; those of a mapping, which training would mix, one by one."""
    if dataset is None or isinstance(dataset, PromptDataset):
        return dataset
    if isinstance(dataset, dict):
        return {name: evaluation_sets(part) for name, part in dataset.items()}
    return PromptDataset(dataset, "eval_dataset")
