"""One reward and one call of it, here or in a process that can be killed; knows no weights and no other reward."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import math
import multiprocessing
import os
import reprlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, SupportsFloat

import numpy as np

from ..errors import AdaptiveDecodeError

# What a reward is handed that is no column of the dataset.
RESERVED: Final = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# How often a process is looked at that may have died without a word.
_TICK: Final = 0.05


class RewardError(AdaptiveDecodeError, RuntimeError):
    """A reward raised, took too long, or gave something that is no list of rewards."""


@dataclass(frozen=True)
class Batch:
    """Columns with one entry a completion; `start` is the first one's place in the batch as it came."""

    columns: dict[str, list[Any]]
    groups: list[int]
    start: int
    trainer_state: Any

    def by_prompt(self) -> list[Batch]:
        parts: list[Batch] = []
        end = 0
        for _, same in itertools.groupby(self.groups):
            start, end = end, end + len(list(same))
            columns = {name: column[start:end] for name, column in self.columns.items()}
            parts.append(Batch(columns, self.groups[start:end], start, self.trainer_state))
        return parts


@dataclass
class Answer:
    """What one call gave: values, NaN for `None`, or why there are none; and what it logged meanwhile."""

    values: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    failure: str | None = None
    cause: BaseException | None = None
    result: Any = None

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)


def failed(error: BaseException) -> Answer:
    """The answer of a call that failed; what it logged before may be of some completions only and is not kept."""
    return Answer(failure=f"{type(error).__name__}: {error}", cause=error)


def joined(parts: Sequence[Batch], answers: Sequence[Answer]) -> Answer:
    """One answer of several; where one failed, its completions are skipped and its rows of extra columns `None`."""
    whole = Answer()
    columns = dict.fromkeys(column for answer in answers for column in answer.extra)
    for part, answer in zip(parts, answers, strict=True):
        count = len(part.groups)
        whole.values += answer.values or [math.nan] * count
        whole.skipped += answer.skipped or [True] * count
        for name, logged in answer.metrics.items():
            whole.metrics.setdefault(name, []).extend(logged)
        for column in columns:
            whole.log_extra(column, answer.extra.get(column, [None] * count))
    return whole


class Function:
    """One reward with its name, and what it takes."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        self._named = {one.name for one in named}
        self._needed = {one.name for one in named if one.default is one.empty}

    def check_needs(self, columns: Mapping[str, Any]) -> None:
        missing = sorted(self._needed - set(columns) - set(RESERVED))
        if missing:
            raise ValueError(f"reward {self.name!r} needs the columns {missing}. The columns are {sorted(columns)}.")

    def invoke(self, batch: Batch) -> Answer:
        """Calls the function; the result is not looked at yet."""
        answer = Answer()
        try:
            answer.result = self.function(**self._arguments(batch, answer))
        except Exception as error:
            return failed(error)
        return answer

    async def invoke_async(self, batch: Batch) -> Answer:
        """The same for an `async` function."""
        answer = Answer()
        try:
            answer.result = await self.function(**self._arguments(batch, answer))
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            # The last two would end the loop that others wait for as well.
            return failed(error)
        return answer

    def _arguments(self, batch: Batch, answer: Answer) -> dict[str, Any]:
        logs = {"log_extra": answer.log_extra, "log_metric": answer.log_metric}
        offered = {**batch.columns, "trainer_state": batch.trainer_state, **logs}
        return {name: value for name, value in offered.items() if self._takes_all or name in self._named}

    def checked(self, answer: Answer, batch: Batch) -> Answer:
        """The answer with its result as numbers."""
        if answer.failure is not None:
            return answer
        result = _listed(answer.result)
        if result is None:
            raise RewardError(
                f"reward {self.name!r} gave {reprlib.repr(answer.result)}; it has to give a list with one for each"
            )
        if len(result) != len(batch.groups):
            raise RewardError(
                f"reward {self.name!r} gave {len(result)} rewards for {len(batch.groups)} completions; it has to give "
                "one for each, None where it does not apply"
            )
        answer.values = [self._number(value, place, batch) for place, value in enumerate(result)]
        answer.skipped = [False] * len(result)
        return answer

    def _number(self, value: Any, place: int, batch: Batch) -> float:
        if value is None:
            return math.nan
        with suppress(TypeError, ValueError, OverflowError):
            if np.ndim(value) == 0 and isinstance(value, SupportsFloat) and math.isfinite(number := float(value)):
                return number
        raise RewardError(
            f"reward {self.name!r} gave {reprlib.repr(value)} for completion {batch.start + place}, of the prompt at "
            f"index {batch.groups[place]}; a reward is a finite number, or None where it does not apply"
        )


def _listed(result: Any) -> list[Any] | None:
    """The entries of a list, a tuple, an array or a tensor; `None` for anything without an order of entries."""
    if isinstance(result, Collection) and not isinstance(result, str | bytes | Mapping | Set):
        with suppress(TypeError):  # an array without dimensions
            return list(result)
    return None


@contextmanager
def child(function: Function, batch: Batch, seconds: float) -> Iterator[Callable[[], Answer]]:
    """A call in a process that leads a group, all of it killed on leaving; gives the way to wait for the answer."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process: Any = fork.Process(target=_work, args=(function, batch, writer))
    process.start()
    deadline = time.monotonic() + seconds
    writer.close()

    def wait() -> Answer:
        try:
            reply = json.loads(_receive(process, reader, deadline))
        except TimeoutError:
            return failed(TimeoutError(f"no answer within {seconds:g} s"))
        except ChildProcessError as error:
            return failed(error)
        if "wrong" in reply:
            raise RewardError(reply["wrong"])
        trace = reply.pop("trace")
        return Answer(**reply, cause=RewardError(trace) if trace else None)

    try:
        yield wait
    finally:
        # The group first, while its leader still holds its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        process.close()
        reader.close()


def _receive(process: Any, reader: Any, deadline: float) -> bytes:
    while True:
        # Processes that the function started may hold the pipe open when their parent is dead: its end is not enough.
        ended = not process.is_alive()
        left = deadline - time.monotonic()
        if reader.poll(0 if ended else min(max(left, 0), _TICK)):
            with suppress(EOFError):
                return bytes(reader.recv_bytes())
            process.join(1.0)
            ended = True
        if ended:
            raise ChildProcessError(f"its process ended with exit code {process.exitcode} and gave no answer")
        if left <= 0:
            raise TimeoutError


def _work(function: Function, batch: Batch, writer: Any) -> None:
    """What happens in the process."""
    os.setsid()
    answer = asyncio.run(function.invoke_async(batch)) if function.is_async else function.invoke(batch)
    try:
        answer = function.checked(answer, batch)
        trace = "".join(traceback.format_exception(answer.cause)) if answer.cause else ""
        kept = {name: vars(answer)[name] for name in ("values", "skipped", "metrics", "extra", "failure")}
        reply = {**kept, "trace": trace}
    except RewardError as wrong:
        reply = {"wrong": str(wrong)}
    data = json.dumps(reply, default=lambda one: one.tolist() if isinstance(one, np.generic | np.ndarray) else str(one))
    # This process is killed once it has answered: what the reward printed may not wait any longer.
    sys.stdout.flush()
    writer.send_bytes(data.encode())
