"""Runs decoders over problems and scores them; knows engines and rewards, nothing of tables or tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..engines.base import Completion
from ..engines.transformers import complete
from ..policies import DecodingPolicy
from .metrics import pass_at_k

Reward = Callable[..., Sequence[float | None]]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Decoder:
    """
    One way to decode.

    Args:
        name (`str`): What tables call it.
        settings (mapping, *optional*): Static sampling parameters.
        policy ([`DecodingPolicy`], *optional*): A policy. With neither, the model's adapter decides.
    """

    name: str
    settings: Settings | None = None
    policy: DecodingPolicy | None = None


GREEDY = Decoder("greedy", {"temperature": 0.0})
DEFAULT = Decoder("default sampling (T=1)", {"temperature": 1.0})


@dataclass(frozen=True)
class Outcome:
    """
    What a decoder did on a set of problems.

    Args:
        decoder ([`Decoder`]): The decoder.
        correct (`np.ndarray` of shape `[problems, samples]`, `bool`): Whether each completion earned a full reward.
        tokens (`np.ndarray` of shape `[problems, samples]`, `int64`): Length of each completion.
        ended (`np.ndarray` of shape `[problems, samples]`, `bool`): Whether each completion ended by itself.
        mean_temperature (`float`, *optional*): Mean over all tokens of what the adapter chose.
        mean_top_p (`float`, *optional*): The same.
    """

    decoder: Decoder
    correct: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray
    mean_temperature: float | None = None
    mean_top_p: float | None = None

    def pass_at(self, k: int) -> np.ndarray:
        """Unbiased pass@k of each problem, `[problems]`."""
        return np.asarray(pass_at_k(self.correct.shape[1], self.correct.sum(axis=1), k))


def run_decoder(
    model: PreTrainedModel,
    tokenizer: Any,
    problems: Sequence[Mapping[str, Any]],
    reward: Reward,
    decoder: Decoder,
    *,
    samples: int,
    token_budget: int | Sequence[int],
    parallel_budget: int | None = None,
    seed: int = 0,
    batch_rows: int = 256,
    show_progress: bool = True,
) -> Outcome:
    """
    Samples every problem `samples` times with one decoder and scores the completions.

    Args:
        model, tokenizer: A base or adaptive model and its tokenizer.
        problems (sequence of mappings): Rows with a `prompt` and whatever columns the reward needs.
        reward (`Callable`): In TRL's signature; a reward of at least 1 counts as correct.
        decoder ([`Decoder`]): How to decode.
        samples, token_budget, parallel_budget, seed, batch_rows: As [`~engines.transformers.complete`] takes them.
        show_progress (`bool`): Whether to show a progress bar.
    """
    completions = complete(
        model,
        tokenizer,
        [row["prompt"] for row in problems],
        samples=samples,
        token_budget=token_budget,
        parallel_budget=parallel_budget,
        settings=decoder.settings,
        policy=decoder.policy,
        seed=seed,
        batch_rows=batch_rows,
        description=decoder.name if show_progress else None,
    )
    scores = score(completions, problems, reward)
    flat = [one for group in completions for one in group]
    shape = (len(problems), samples)
    return Outcome(
        decoder,
        scores >= 1.0,
        np.array([len(one.token_ids) for one in flat]).reshape(shape),
        np.array([one.ended for one in flat]).reshape(shape),
        _mean([one.temperature for one in flat]),
        _mean([one.top_p for one in flat]),
    )


def score(
    completions: Sequence[Sequence[Completion]], problems: Sequence[Mapping[str, Any]], reward: Reward
) -> np.ndarray:
    """
    Rewards of all completions, `[problems, samples]`, `float64`.

    Raises:
        `ValueError`: If the reward gives another number of values than there are completions, or none for one.
    """
    rows = [(row, one) for row, group in zip(problems, completions, strict=True) for one in group]
    return score_rows([row for row, _ in rows], [one for _, one in rows], reward).reshape(len(problems), -1)


def score_rows(problems: Sequence[Mapping[str, Any]], completions: Sequence[Completion], reward: Reward) -> np.ndarray:
    """As [`score`], of completions with each its own problem, `[completions]`."""
    columns = {name: [row[name] for row in problems] for name in problems[0] if name not in ("prompt", "completion")}
    values = reward(
        prompts=[row["prompt"] for row in problems],
        completions=[as_answer(row["prompt"], one.text) for row, one in zip(problems, completions, strict=True)],
        completion_ids=[list(one.token_ids) for one in completions],
        **columns,
    )
    if len(values) != len(completions) or any(value is None for value in values):
        name = getattr(reward, "__name__", "the reward")
        raise ValueError(f"{name} gave {len(values)} values for {len(completions)} completions; it has to score each.")
    return np.asarray(values, dtype=np.float64)


def as_answer(prompt: Any, text: str) -> Any:
    """A completion as TRL hands it to rewards: text for a text prompt, a message list for a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _mean(parts: Sequence[np.ndarray | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return float(np.concatenate(known).mean()) if known else None
