"""Learned policies beside every cheaper decoder, in cells of token and parallel budget; knows no particular task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..configuration import AutoDecoConfig
from ..engines.base import Completion
from ..engines.transformers import complete
from ..policies import DecodingPolicy, build_policy
from .baselines import STATIC_GRID, describe
from .metrics import bootstrap_interval, pass_at_k
from .runner import DEFAULT, GREEDY, Decoder, Reward, score

# What a masked static is chosen from, for policies that leave sure tokens to greedy decoding.
MASKED_TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
Right = dict[int, np.ndarray]  # right completions of each problem, `[problems]`, by token budget


@dataclass(frozen=True)
class _Measured:
    """A decoder that knows no budget: run once at the longest token budget, and cut for the others."""

    decoder: Decoder
    right: Right


class _Problems:
    """One set of problems, and what decoders do on it; the same decoder is run once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        problems: Sequence[Mapping[str, Any]],
        reward: Reward,
        budgets: Sequence[int],
        samples: int,
        label: str,
        how: Mapping[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.problems, self.reward = model, tokenizer, problems, reward
        self.budgets, self.samples, self.label = sorted(budgets), samples, label
        self.how = {name: value for name, value in how.items() if name != "show_progress"}
        self.shows = how.get("show_progress", True)
        self._seen: dict[str, _Measured] = {}

    def measure(self, decoder: Decoder) -> _Measured:
        if decoder.policy is not None:
            decoder.policy.to(self.model.device)
        key = decoder.name if decoder.policy is not None else str(sorted((decoder.settings or {}).items()))
        if key not in self._seen:
            longest = self._complete(decoder, self.budgets[-1])
            cut = {b: [_cut(group, b, self.tokenizer) for group in longest] for b in self.budgets}
            self._seen[key] = _Measured(decoder, {b: self._right(groups) for b, groups in cut.items()})
        return replace(self._seen[key], decoder=decoder)

    def run_policy(self, name: str, policy: DecodingPolicy, parallel: int) -> tuple[Right, dict[str, float]]:
        """Right completions by token budget, and the mean temperature and top-p of all their tokens."""
        right: Right = {}
        values: dict[str, list[Any]] = {"temperature": [], "top_p": []}
        for budget in self.budgets:
            found = self._complete(Decoder(f"{name}, B = {parallel}, b = {budget}", policy=policy), budget, parallel)
            right[budget] = self._right(found)
            for parameter, column in values.items():
                column += [vars(one)[parameter] for group in found for one in group]
        return right, {parameter: float(np.concatenate(column).mean()) for parameter, column in values.items()}

    def _complete(self, decoder: Decoder, budget: int, parallel: int | None = None) -> list[list[Completion]]:
        return complete(
            self.model,
            self.tokenizer,
            [row["prompt"] for row in self.problems],
            samples=self.samples,
            token_budget=budget,
            parallel_budget=parallel,
            settings=decoder.settings,
            policy=decoder.policy,
            description=f"{self.label}: {decoder.name}" if self.shows else None,
            **self.how,
        )

    def _right(self, completions: Sequence[Sequence[Completion]]) -> np.ndarray:
        return np.asarray((score(completions, self.problems, self.reward) >= 1.0).sum(axis=1))


def compare_policies(
    model: PreTrainedModel,
    tokenizer: Any,
    validation: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
    reward: Reward,
    policies: Mapping[str, Sequence[DecodingPolicy]],
    *,
    token_budgets: Sequence[int],
    parallel_budgets: Sequence[int],
    samples: int,
    grid: Sequence[dict[str, float]] = STATIC_GRID,
    seed: int = 0,
    **how: Any,
) -> dict[str, Any]:
    """
    pass@B of trained policies on test problems, against everything that is cheaper.

    Beside them stand greedy, default sampling, the best static for each B (chosen on validation over all token budgets,
    and again for each cell alone), its masked form if the policies leave sure tokens to greedy decoding, a uniform
    mixture of the first policy's actions, and MeanShift: the mean temperature and top-p of the first policy's own
    tokens on validation, for each B.

    Args:
        model, tokenizer: The base model (or an adaptive one) and its tokenizer.
        validation, test (sequences of mappings): Problems; baselines are chosen on the first.
        reward (`Callable`): In TRL's signature; at least 1 counts as right.
        policies (mapping): Trained policies by name, one for each training seed. The first name is what baselines and
            the others (a twin, an ablation) are subtracted from.
        token_budgets, parallel_budgets (sequences of `int`): The cells.
        samples (`int`): Completions of each problem, at least the largest B.
        grid (sequence of `dict`): Statics to choose from, greedy aside.
        seed, how: As [`~engines.transformers.complete`] takes them.

    Returns:
        `dict` of JSON's types: `cells`, for each B one of all token budgets together (`None`), and one for each if
        there are several, with the interval of every decoder and of the first policy's gain over it.
    """
    if samples < max(parallel_budgets):
        raise ValueError(f"`samples` is {samples}; pass@{max(parallel_budgets)} needs at least as many.")
    common = (reward, token_budgets, samples)
    chooser = _Problems(model, tokenizer, validation, *common, "validation", {**how, "seed": seed + 1})
    judge = _Problems(model, tokenizer, test, *common, "test", {**how, "seed": seed + 2})
    statics = [chooser.measure(Decoder(describe(one), one)) for one in ({"temperature": 0.0}, *grid)]
    masked = [chooser.measure(one) for one in _masked(next(iter(policies.values()))[0])]
    cells, shifts = [], {}
    for parallel in parallel_budgets:
        found, shifts[str(parallel)] = _cells(policies, parallel, chooser, judge, statics, masked)
        cells += found
    return {
        "problems": len(test),
        "validation_problems": len(validation),
        "samples": samples,
        "token_budgets": chooser.budgets,
        "training_seeds": {name: len(group) for name, group in policies.items()},
        "interval": "95% bootstrap over problems of the mean over training seeds; differences paired by problem",
        "mean_shift": shifts,
        "cells": cells,
    }


def _cells(
    policies: Mapping[str, Sequence[DecodingPolicy]],
    parallel: int,
    chooser: _Problems,
    judge: _Problems,
    statics: Sequence[_Measured],
    masked: Sequence[_Measured],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The cells of one B, and its MeanShift."""
    main = next(iter(policies))
    right = {name: [judge.run_policy(name, one, parallel)[0] for one in group] for name, group in policies.items()}
    means = [chooser.run_policy(main, one, parallel)[1] for one in policies[main]]
    shift = {name: float(np.mean([mean[name] for mean in means])) for name in means[0]}
    fixed = [GREEDY, DEFAULT, _named("MeanShift", Decoder("", shift)), _mixture(policies[main][0])]
    cells = []
    for budget in (None, *(judge.budgets if len(judge.budgets) > 1 else ())):
        chosen = _chosen(statics, masked, judge.samples, parallel, budget)
        baselines = [judge.measure(decoder) for decoder in (*fixed, *chosen)]
        cells.append(_cell(right, baselines, judge.samples, parallel, budget))
    return cells, shift


def _chosen(
    statics: Sequence[_Measured], masked: Sequence[_Measured], samples: int, parallel: int, budget: int | None
) -> Iterator[Decoder]:
    """What validation chooses for a B over all token budgets, and for the cell alone."""
    yield _named("best static", _best(statics, samples, parallel, None))
    if budget is not None:
        yield _named("best static of this cell", _best(statics, samples, parallel, budget))
    if masked:
        yield _named("best masked static", _best(masked, samples, parallel, None))


def _cell(
    right: Mapping[str, Sequence[Right]],
    baselines: Sequence[_Measured],
    samples: int,
    parallel: int,
    budget: int | None,
) -> dict[str, Any]:
    """Every decoder's pass@B in one cell, and the first policy's gain over it."""
    seeds = {name: [_pass(one, samples, parallel, budget) for one in group] for name, group in right.items()}
    values = {name: np.mean(group, axis=0) for name, group in seeds.items()}
    main = next(iter(values))
    rows: list[dict[str, Any]] = []
    for name, value in values.items():
        row: dict[str, Any] = {"decoder": name, "pass": vars(bootstrap_interval(value))}
        row["by_seed"] = [float(one.mean()) for one in seeds[name]]
        rows.append(row if name == main else row | {"gain": vars(bootstrap_interval(values[main] - value))})
    for one in baselines:
        value = _pass(one.right, samples, parallel, budget)
        row = {"decoder": one.decoder.name, "settings": one.decoder.settings, "pass": vars(bootstrap_interval(value))}
        rows.append(row | {"gain": vars(bootstrap_interval(values[main] - value))})
    return {"parallel_budget": parallel, "token_budget": budget, "rows": rows}


def _pass(right: Right, samples: int, parallel: int, budget: int | None) -> np.ndarray:
    """pass@B of each problem, at one token budget or as the mean over all, `[problems]`."""
    chosen = list(right.values()) if budget is None else [right[budget]]
    return np.asarray(np.mean([pass_at_k(samples, one, parallel) for one in chosen], axis=0))


def _best(found: Sequence[_Measured], samples: int, parallel: int, budget: int | None) -> Decoder:
    return max(found, key=lambda one: float(_pass(one.right, samples, parallel, budget).mean())).decoder


def _cut(group: Sequence[Completion], budget: int, tokenizer: Any) -> list[Completion]:
    """What a decoder that knows no budget would have written with a shorter one."""

    def cut(one: Completion) -> Completion:
        if len(one.token_ids) <= budget:
            return one
        ids = one.token_ids[:budget]
        return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, ended=False)

    return [cut(one) for one in group]


def _named(kind: str, decoder: Decoder) -> Decoder:
    settings = {name: round(value, 3) for name, value in (decoder.settings or {}).items()}
    return replace(decoder, name=f"{kind} ({describe(settings) if decoder.policy is None else decoder.name})")


def _static(actions: Any, mask: float | None) -> DecodingPolicy:
    return build_policy(AutoDecoConfig(policy="static", actions=actions, max_prob_mask=mask)).eval()


def _mixture(policy: DecodingPolicy) -> Decoder:
    return Decoder("mixture of its actions", policy=_static(policy.config.actions, policy.config.max_prob_mask))


def _masked(policy: DecodingPolicy) -> Iterator[Decoder]:
    limit = policy.config.max_prob_mask
    for temperature in MASKED_TEMPERATURES if limit is not None else ():
        yield Decoder(f"T={temperature:g}", policy=_static([{"temperature": temperature}], limit))
