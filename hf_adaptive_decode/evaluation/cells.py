"""Scores of decoders under one token budget, or several together; knows runs and metrics, no baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..training.credit import group_value
from .metrics import pass_at_k
from .runner import Decoder
from .runs import Runs, Sampled, hears_samples

_SETTINGS = ("temperature", "top_p")
_DIGITS = 4


@dataclass(frozen=True)
class Scores:
    """
    What a decoder, or the same policy of several training seeds, reached on a split's problems.

    Args:
        values (mapping of `str` to `np.ndarray` of shape `[problems]`): `"pass@k"` and, where answers can be read,
            `"maj@k"` of each problem: means over training seeds and token budgets.
        by_seed (mapping of `str` to list of `float`): The mean over problems of each training seed's policy.
        mean_tokens, truncated (`float`): Mean length, and part of the completions that their budget cut off.
        seconds_per_1k_tokens (`float`, *optional*): Time of a batch by its tokens; `None` if all were cut shorter.
        settings (mapping of `str` to `dict`): By metric, the mean temperature and top-p of all tokens.
    """

    values: dict[str, np.ndarray]
    by_seed: dict[str, list[float]]
    mean_tokens: float
    truncated: float
    seconds_per_1k_tokens: float | None
    settings: dict[str, dict[str, float]] = field(default_factory=dict)


class Cell:
    """
    One task under one token budget, or under several together.

    Args:
        runs ([`Runs`]): Samples what is asked for.
        budgets (sequence of `int`): Token budgets; scores are means over them.
        ks (sequence of `int`): For which k. A policy that is told B is run once for each, with B = k.
    """

    def __init__(self, runs: Runs, budgets: Sequence[int], ks: Sequence[int]) -> None:
        self.runs, self.budgets, self.ks = runs, tuple(budgets), tuple(ks)
        # With the decoders, so that a policy's id is not given to another while it is a key.
        self._known: dict[Any, tuple[Sequence[Decoder], Scores]] = {}

    @property
    def token_budget(self) -> int | None:
        """The budget, `None` if there are several."""
        return self.budgets[0] if len(self.budgets) == 1 else None

    def scores(self, decoders: Sequence[Decoder], split: str) -> Scores:
        """
        Args:
            decoders (sequence of [`Decoder`]): One, or one for each training seed.
            split (`str`): `"validation"` or `"test"`.
        """
        key = (split, *(id(one.policy) if one.policy else str(one.settings) for one in decoders))
        if key not in self._known:
            self._known[key] = (decoders, self._score(decoders, split))
        return self._known[key][1]

    def _sample(self, decoders: Sequence[Decoder], split: str, k: int) -> list[list[Sampled]]:
        """By decoder and token budget."""
        return [[self.runs.sample(one, split, budget, k) for budget in self.budgets] for one in decoders]

    def _score(self, decoders: Sequence[Decoder], split: str) -> Scores:
        # What does not hear B writes the same for every k.
        heard = self.ks if any(hears_samples(one.policy) for one in decoders) else self.ks[:1]
        found = {k: self._sample(decoders, split, k) for k in heard}
        sampled = {k: found.get(k, found[self.ks[0]]) for k in self.ks}
        values, by_seed, settings = {}, {}, {}
        for k, by_decoder in sampled.items():
            for name, of in _metrics(by_decoder[0][0], k).items():
                table = np.array([np.mean([of(one, k) for one in group], axis=0) for group in by_decoder])
                values[name], by_seed[name] = table.mean(axis=0), table.mean(axis=1).tolist()
                settings[name] = _mean_settings(by_decoder)
        everything = [one for by_decoder in sampled.values() for group in by_decoder for one in group]
        timed = [(one.seconds, one.tokens) for one in everything if np.isfinite(one.seconds).all()]
        return Scores(
            values,
            by_seed,
            float(np.mean([one.tokens.mean() for one in everything])),
            float(1 - np.mean([one.ended.mean() for one in everything])),
            1000 * float(sum(s.sum() for s, _ in timed) / sum(t.sum() for _, t in timed)) if timed else None,
            settings,
        )


def _metrics(example: Sampled, k: int) -> Mapping[str, Any]:
    found: dict[str, Any] = {f"pass@{k}": _pass}
    if example.answers is not None and k > 1:
        found[f"maj@{k}"] = _majority
    return found


def _pass(one: Sampled, k: int) -> np.ndarray:
    right = one.reward >= 1
    return np.asarray(pass_at_k(right.shape[1], right.sum(axis=1), k))


def _majority(one: Sampled, k: int) -> np.ndarray:
    """Whether the commonest answer of k samples is right: mean over the k-subsets of what was drawn."""
    parallel = np.full(len(one.reward), k)
    return np.asarray(group_value(one.reward >= 1, parallel, "majority", answers=one.answers))


def _mean_settings(by_decoder: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """Mean over a policy's tokens, so that a long completion counts for more, and then over training seeds."""
    means = []
    for group in by_decoder:
        tokens = np.concatenate([one.tokens.ravel() for one in group])
        columns = [np.concatenate([vars(one)[name].ravel() for one in group]) for name in _SETTINGS]
        means.append([np.average(column, weights=tokens) for column in columns])
    # Rounded as one would type it: another batch size gives other last digits, which are not another setting.
    return {name: round(value, _DIGITS) for name, value in zip(_SETTINGS, np.mean(means, axis=0).tolist(), strict=True)}
