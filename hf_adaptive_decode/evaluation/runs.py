"""Decoders on the problems of one task, every completion kept on disk as it is made; knows no baselines or tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..engines.base import Completion
from ..engines.engine import Engine, is_greedy
from ..engines.transformers import TransformersEngine
from ..policies import DecodingPolicy
from .digests import model_digest, policy_digest, rows_digest
from .runner import Decoder, score_rows
from .store import CompletionStore
from .tasks import Task

Row = Mapping[str, Any]
# Added to the seed, so that nothing is chosen by the draws that it is then judged by.
_SHIFTS = {"validation": 1, "test": 2}


@dataclass(frozen=True)
class Sampled:
    """
    What a decoder wrote for the problems of one split under one budget: arrays of shape `[problems, samples]`.

    Args:
        reward (`np.ndarray`, `float64`): Rewards; 1 or more counts as right.
        tokens (`np.ndarray`, `int64`): Lengths.
        ended (`np.ndarray`, `bool`): Whether a completion ended by itself.
        temperature, top_p (`np.ndarray`, `float64`): Means over a completion's tokens of what it was sampled with.
        seconds (`np.ndarray`, `float64`): Each completion's share of the time that passed since others had ended: they
            add up to all of it. NaN where it was cut from a longer one.
        answers (list of lists, *optional*): What each says, for voting.
    """

    reward: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    seconds: np.ndarray
    answers: list[list[str | None]] | None


class Runs:
    """
    Decoders on one task. What has been sampled once, now or by a run before, is not sampled again.

    In transformers a completion depends on the decoder, the seed, the problem and the sample's number alone. So the
    batch size does not matter, and more samples, problems, budgets or decoders add to what is there.

    Args:
        model, tokenizer: A base or adaptive model and its tokenizer.
        task ([`Task`]): Problems and their reward.
        samples (`int`): Completions of each problem and seed.
        seeds (sequence of `int`): Each draws `samples` of its own; they count together.
        token_budgets (sequence of `int`): New tokens. Decoders that know no budget are run at the longest and cut.
        store ([`CompletionStore`], *optional*): Keeps completions.
        batch_rows (`int`): Most sequences decoded at once.
        show_progress (`bool`): Whether to show progress bars.
        engine ([`Engine`], *optional*): Decodes whatever it does not refuse; transformers does the rest, or everything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        *,
        samples: int,
        seeds: Sequence[int] = (0,),
        token_budgets: Sequence[int] = (256,),
        store: CompletionStore | None = None,
        batch_rows: int = 256,
        show_progress: bool = True,
        engine: Engine | None = None,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.samples, self.seeds, self.token_budgets = samples, tuple(seeds), tuple(sorted(token_budgets))
        self.store = store or CompletionStore()
        self.batch_rows, self.show_progress = batch_rows, show_progress
        self._transformers = TransformersEngine(model, tokenizer, batch_rows=batch_rows)
        self.engine = engine or self._transformers
        self._facts = {"model": model_digest(model), "task": task.name, "reward": _name(task.reward)}
        self._digests = {split: rows_digest(self.problems(split)) for split in ("validation", "test")}

    def problems(self, split: str) -> Sequence[Row]:
        """The rows of `"validation"` or `"test"`."""
        return self.task.validation if split == "validation" else self.task.test

    def refusal(self, decoder: Decoder) -> str | None:
        """Why the engine leaves a decoder to transformers; `None` if it does not."""
        return self.engine.refusal(settings=decoder.settings, policy=decoder.policy)

    def engine_of(self, decoder: Decoder) -> Engine:
        """What decodes by `decoder`."""
        return self.engine if self.refusal(decoder) is None else self._transformers

    def sample(self, decoder: Decoder, split: str, token_budget: int, parallel_budget: int) -> Sampled:
        """
        A decoder's completions of a split, those of all seeds side by side.

        Args:
            decoder ([`Decoder`]): How to decode.
            split (`str`): `"validation"` or `"test"`.
            token_budget (`int`): One of `token_budgets`.
            parallel_budget (`int`): B, as a policy that is told it hears.
        """
        told = () if decoder.policy is None else decoder.policy.config.budget_features
        budgets = (token_budget,) if "tokens" in told else self.token_budgets
        parallel = parallel_budget if hears_samples(decoder.policy) else None
        # With other rows in their places the completions or their rewards would be others.
        facts = {**self._facts, "split": split, "problems": self._digests[split], **_identity(self.model, decoder)}
        engine = self.engine_of(decoder)
        if engine.name != TransformersEngine.name:
            facts["engine"] = engine.name
        parts = []
        for seed in self.seeds:
            own = {**facts, "parallel_budget": parallel, "seed": seed}
            runs = {budget: self.store.run({**own, "token_budget": budget}, decoder.name) for budget in budgets}
            self._fill(engine, decoder, split, runs, seed + _SHIFTS[split], parallel_budget)
            parts.append(self.store.done(runs[token_budget]))
        return self._gather(parts, len(self.problems(split)), is_greedy(decoder.settings))

    def _fill(
        self, engine: Engine, decoder: Decoder, split: str, runs: Mapping[int, str], seed: int, parallel: int
    ) -> None:
        """Samples what is missing of the runs, by budget, and scores it as it ends."""
        problems = self.problems(split)
        each = 1 if is_greedy(decoder.settings) else self.samples
        places = [(index, sample) for index in range(len(problems)) for sample in range(each)]
        wanted = [place for place in places if any(place not in self.store.done(run) for run in runs.values())]
        if not wanted:
            return
        batches = engine.complete_batches(
            [row["prompt"] for row in problems],
            wanted,
            token_budget=max(runs),
            parallel_budget=parallel,
            settings=decoder.settings,
            policy=decoder.policy,
            seed=seed,
        )
        name = f"{self.task.name}, {split}: {decoder.name}"
        began = time.perf_counter()
        with tqdm(total=len(wanted), desc=name, unit="row", disable=not self.show_progress, leave=False) as bar:
            for batch in batches:
                seconds = (time.perf_counter() - began) / len(batch)
                for budget, run in runs.items():
                    # A process may have been killed between two of them.
                    missing = [one for one in batch if one[:2] not in self.store.done(run)]
                    self.store.add(self._lines(run, problems, missing, budget, seconds))
                bar.update(len(batch))
                began = time.perf_counter()

    def _lines(
        self, run: str, problems: Sequence[Row], batch: Sequence[tuple[int, int, Completion]], budget: int, spent: float
    ) -> list[dict[str, Any]]:
        if not batch:
            return []
        cut = [(index, sample, _cut(one, budget, self.tokenizer), one) for index, sample, one in batch]
        rewards = score_rows([problems[index] for index, *_ in cut], [one for _, _, one, _ in cut], self.task.reward)
        read = self.task.answer
        return [
            {
                "run": run,
                "problem": index,
                "sample": sample,
                "reward": float(reward),
                "tokens": len(one.token_ids),
                "ended": one.ended,
                "temperature": _mean(one.temperature),
                "top_p": _mean(one.top_p),
                "seconds": round(spent, 6) if one is whole else None,
                **({} if read is None else {"answer": read(one.text)}),
                "text": one.text,
            }
            for (index, sample, one, whole), reward in zip(cut, rewards, strict=True)
        ]

    def _gather(
        self, parts: Sequence[Mapping[tuple[int, int], dict[str, Any]]], problems: int, greedy: bool
    ) -> Sampled:
        places = [[(index, 0 if greedy else sample) for sample in range(self.samples)] for index in range(problems)]

        def column(name: str, kind: type) -> np.ndarray:
            rows = [[part[place][name] for part in parts for place in row] for row in places]
            return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=kind)

        answers = None
        if self.task.answer is not None:
            answers = [[part[place]["answer"] for part in parts for place in row] for row in places]
        kinds: dict[str, type] = {"reward": float, "tokens": int, "ended": bool}
        kinds |= {"temperature": float, "top_p": float, "seconds": float}
        return Sampled(**{name: column(name, kind) for name, kind in kinds.items()}, answers=answers)


def hears_samples(policy: DecodingPolicy | None) -> bool:
    """Whether what a policy does depends on the parallel budget B: it is told, or has another prior for each."""
    config = None if policy is None else policy.config
    return config is not None and ("samples" in config.budget_features or len(config.action_prior or ()) > 1)


def _identity(model: PreTrainedModel, decoder: Decoder) -> dict[str, Any]:
    """What makes a decoder that one and no other; its name does not."""
    if decoder.policy is not None:
        return {"policy": policy_digest(decoder.policy)}
    if decoder.settings is not None:
        return {"settings": {name: float(value) for name, value in decoder.settings.items()}}
    raise ValueError(
        f"{decoder.name!r} has neither settings nor a policy; pass `model.decoding_adapter` for a model's."
    )


def _cut(one: Completion, budget: int, tokenizer: Any) -> Completion:
    """What a decoder that knows no budget would have written with a shorter one."""
    if len(one.token_ids) <= budget:
        return one
    ids = one.token_ids[:budget]
    rest = {name: None if (v := vars(one)[name]) is None else v[:budget] for name in ("temperature", "top_p", "action")}
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, ended=False, **rest)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None or not len(values) else float(values.mean(dtype=np.float64))


def _name(reward: Any) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))
