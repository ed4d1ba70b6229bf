"""Calls one or several rewards in TRL's signature and gives one table of numbers; knows no trainer and no model."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ._call import RESERVED, Answer, Batch, Function, RewardError, child, joined
from .columns import check_column

__all__ = ["Reward", "RewardError", "RewardFunctions", "Rewards"]

logger = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float | None]]  # or an `async def` that gives the same


@dataclass(frozen=True)
class Rewards:
    """
    What the rewards said about a batch.

    Args:
        values (`np.ndarray` of shape `[functions, completions]`, `float64`): NaN where a function gave `None` or was
            skipped.
        total (`np.ndarray` of shape `[completions]`, `float64`): The weighted sum over the functions that applied; NaN
            where none did and where one was skipped.
        skipped (`int`): Completions that a reward was skipped for because it raised or took too long.
        metrics (`dict[str, float]`): What rewards gave to `log_metric`, averaged.
        extra (`dict[str, list]`): What rewards gave to `log_extra`. A column that several rewards log is kept apart as
            `reward/column` from the second one on.
    """

    values: np.ndarray
    total: np.ndarray
    skipped: int
    metrics: dict[str, float]
    extra: dict[str, list[Any]]


class RewardFunctions:
    """
    One or several rewards, called as TRL calls them.

    A function that takes `**kwargs` is handed everything; any other only what it names. A function that fails on a
    batch is called again prompt by prompt, to find the prompts it fails on. Those that are `async` run together, in one
    event loop that lasts as long as this object.

    With a `timeout` every call runs in a forked process, which is killed with all it started once it answered or is
    late. There a reward works on a copy: state that it keeps does not come back, what it logs comes back as JSON, and
    it cannot use CUDA. `async` functions get a process each, all at once.

    Args:
        functions (`Callable` or sequence of them): The rewards.
        weights (`Sequence[float]`, *optional*): One for each function, by default 1.
        on_error (`str`): What an exception or a missed deadline means: `"raise"` a [`RewardError`] that names the
            prompt, `"skip"` the completions of that prompt and count them. A wrong answer is always an error.
        timeout (`float`, *optional*): Seconds for one call.

    Raises:
        `ValueError`: If an argument is not as above, or `timeout` is given where processes cannot be forked.

    Example:
        >>> RewardFunctions(lambda completions: [len(c) for c in completions])(["?"], ["yes"], [[7]], {}).total
        array([3.])
    """

    def __init__(
        self,
        functions: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        on_error: str = "raise",
        timeout: float | None = None,
    ) -> None:
        listed: list[Any] = list(functions) if isinstance(functions, Sequence) else [functions]
        if not listed or not all(callable(function) for function in listed):
            raise ValueError(f"`functions` must be one callable or several. Got {functions!r}.")
        weights = [1.0] * len(listed) if weights is None else list(weights)
        if len(weights) != len(listed):
            raise ValueError(f"Got {len(listed)} reward functions and {len(weights)} weights. They must pair up.")
        if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
            raise ValueError(f"`weights` must be finite numbers. Got {weights}.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip". Got {on_error!r}.')
        if timeout is not None and not (isinstance(timeout, Real) and 0 < timeout < math.inf):
            raise ValueError(f"`timeout` must be a positive, finite number of seconds, or None. Got {timeout!r}.")
        if timeout is not None and "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(
                f"`timeout={timeout}` needs processes made by fork, which {sys.platform} lacks. Pass `timeout=None`."
            )
        self.names = _unique_names(listed)
        self.weights, self.on_error, self.timeout = np.array(weights, dtype=np.float64), on_error, timeout
        self._functions = [Function(name, function) for name, function in zip(self.names, listed, strict=True)]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        groups: Sequence[int] | None = None,
        trainer_state: Any = None,
    ) -> Rewards:
        """
        The rewards of a batch.

        Args:
            prompts, completions (`Sequence`): One of each a completion, texts or message lists.
            completion_ids (`Sequence[Sequence[int]]`): The tokens of each completion.
            columns (`Mapping[str, Sequence]`): The dataset's other columns, one entry a completion.
            groups (`Sequence[int]`, *optional*): The dataset's index of each completion's prompt, by default 0, 1, ...
            trainer_state (*optional*): Handed to the rewards as it is.

        Raises:
            `ValueError`: If the arguments do not pair up, or a function needs a column that is not there.
            [`RewardError`]: If a function gives no list of finite numbers and `None`, one a completion; with
                `on_error="raise"` also if it raises or takes too long.
        """
        if not len(completions):
            return Rewards(np.zeros((len(self.names), 0)), np.zeros(0), 0, {}, {})
        taken = sorted(set(columns) & set(RESERVED))
        if taken:
            raise ValueError(f"Rewards are handed something else as {taken}. Rename these columns of the dataset.")
        groups = range(len(completions)) if groups is None else groups
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        for name, column in {**given, "groups": groups}.items():
            check_column(name, column, completions)
        for function in self._functions:
            function.check_needs(given)
        batch = Batch(
            {name: list(column) for name, column in given.items()}, [int(index) for index in groups], 0, trainer_state
        )
        answers: dict[str, Answer] = {}
        waiting = [function for function in self._functions if function.is_async]
        for together in [*([one] for one in self._functions if not one.is_async), waiting]:
            for function, answer in zip(together, self._call(together, batch), strict=True):
                answers[function.name] = self._settle(function, batch, answer)
        return self._table([answers[name] for name in self.names])

    def _call(self, functions: Sequence[Function], batch: Batch) -> list[Answer]:
        """What one function gives for a batch, or several that are all `async`."""
        if self.timeout is not None:
            with ExitStack() as stack:
                waits = [stack.enter_context(child(one, batch, self.timeout)) for one in functions]
                return [wait() for wait in waits]
        if functions and functions[0].is_async:
            futures = [asyncio.run_coroutine_threadsafe(one.invoke_async(batch), self._loop) for one in functions]
            answers = [future.result() for future in futures]
        else:
            answers = [one.invoke(batch) for one in functions]
        return [one.checked(answer, batch) for one, answer in zip(functions, answers, strict=True)]

    @functools.cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """In a thread, as the caller may be inside a loop; kept, so that a reward's open connections stay good."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
        return loop

    def _settle(self, function: Function, batch: Batch, answer: Answer) -> Answer:
        """The answer itself, or in place of one that failed what the function gives prompt by prompt."""
        if answer.failure is None:
            return answer
        parts, answers = batch.by_prompt(), []
        for part in parts:
            # A batch of one prompt has been tried already.
            one = answer if len(parts) == 1 else self._call([function], part)[0]
            if one.failure is not None and self.on_error == "raise":
                raise RewardError(
                    f"reward {function.name!r} raised {one.failure} for the prompt at index {part.groups[0]}; "
                    'pass reward_errors="skip" to skip and count such prompts, or mend the reward'
                ) from one.cause
            answers.append(one)
        if self.on_error == "raise":
            raise RewardError(
                f"reward {function.name!r} raised {answer.failure} for {len(batch.groups)} completions together; it "
                "could not be pinned to one prompt, as it raised for none of them alone; mend the reward, or pass "
                'reward_errors="skip" to take what it gives prompt by prompt'
            ) from answer.cause
        bad = [(part.groups[0], one.failure) for part, one in zip(parts, answers, strict=True) if one.failure]
        if bad:
            indices = [index for index, _ in bad]
            logger.warning("reward %r raised %s; skipped the prompts at %s", function.name, bad[0][1], indices)
        return joined(parts, answers)

    def _table(self, answers: Sequence[Answer]) -> Rewards:
        values = np.array([answer.values for answer in answers], dtype=np.float64)
        skipped = np.array([answer.skipped for answer in answers], dtype=bool).any(axis=0)
        applied = ~np.isnan(values)
        total = np.where(applied, self.weights[:, None] * values, 0.0).sum(axis=0)
        total[skipped | ~applied.any(axis=0)] = np.nan
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for name, answer in zip(self.names, answers, strict=True):
            for metric, logged in answer.metrics.items():
                metrics.setdefault(metric, []).extend(logged)
            extra |= {f"{name}/{column}" if column in extra else column: rows for column, rows in answer.extra.items()}
        means = {metric: float(np.mean(logged)) for metric, logged in metrics.items()}
        return Rewards(values, total, int(skipped.sum()), means, extra)


def _unique_names(functions: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for function in functions:
        inner = function.func if isinstance(function, functools.partial) else function
        # An object may well have a name of its own, as TRL's configurable rewards do.
        plain = getattr(inner, "__name__", type(inner).__name__)
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        names.append(plain if plain not in names else next(name for name in numbered if name not in names))
    return names
