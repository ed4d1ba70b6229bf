"""Rewards answers that are mathematically equal to the solution; knows math-verify only as a process it can kill."""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import AdaptiveDecodeError, MissingExtraError
from .columns import check_column, completion_texts, score_in_threads
from .exact import is_exact_match, marked_answer

logger = logging.getLogger(__name__)

MAX_CHARACTERS: Final = 10_000
TIMEOUT: Final = 5.0
MEMORY: Final = 2 * 1024**3
STARTUP_TIMEOUT: Final = 120.0
_LOGGED_CHARACTERS: Final = 80
# Words, which math-verify reads as a product of letters.
_WORDS: Final = re.compile(r"\s*[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*\s*")


class MathWorkerError(AdaptiveDecodeError, RuntimeError):
    """The process that compares answers cannot be started."""


def math_reward(
    completions: Sequence[Any],
    solution: Sequence[str | int | float | None],
    prompts: Sequence[Any] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    timeout: float = TIMEOUT,
    workers: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""
    1.0 where the completion's answer is mathematically equal to the solution, 0.0 elsewhere, `None` without a solution.

    math-verify reads and compares the answers, in worker processes that are killed and replaced when a comparison
    exceeds its time or memory. Such a completion earns 0.0; each kill is
    logged as a warning and counted in [`worker_failures`]. A solution that math-verify cannot read as mathematics, or
    that is words, is compared by the rules of [`exact_match_reward`].

    Args:
        completions (`Sequence[str | list[dict]]`): Texts or message lists. Of a longer one the last 10,000 characters
            are read, since an answer comes behind the reasoning.
        solution (`Sequence[str | None]`): One solution a completion, bare (`\frac{1}{2}`), in dollar signs or
            `\boxed{...}`, or after `####`.
        prompts, completion_ids, **columns: What else TRL passes; not needed.
        timeout (`float`): Seconds for one comparison.
        workers (`int`): How many comparisons run at once.

    Raises:
        [`MissingExtraError`]: If math-verify is not installed.

    Example:
        >>> math_reward(completions=["so \\boxed{0.5}"], solution=["\\frac{1}{2}"])
        [1.0]
    """
    check_column("solution", solution, completions)
    if not 0 < timeout < float("inf"):
        raise ValueError(f"`timeout` must be positive and finite. Got {timeout}.")
    if importlib.util.find_spec("math_verify") is None:
        raise MissingExtraError("math-verify", "math")
    texts = completion_texts(completions)
    pairs = [(None if s is None else str(s), text) for s, text in zip(solution, texts, strict=True)]
    return score_in_threads(lambda pair: _score(*pair, timeout), pairs, workers)


def worker_failures() -> int:
    """How many comparisons of this process ended with a killed or dead worker, each of them a reward of 0.0."""
    return _POOL.failures


def _score(solution: str | None, text: str, timeout: float) -> float | None:
    if solution is None:
        return None
    if len(solution) > MAX_CHARACTERS:
        logger.warning("A solution of more than %d characters is not read; answers to it earn 0.0.", MAX_CHARACTERS)
        return 0.0
    text = text[-MAX_CHARACTERS:]
    boxes = text.count(r"\boxed{")
    answers = [text]
    if boxes > 1:
        # The last one is the answer; but all of them are where a problem has several.
        answers.insert(0, rf"\boxed{{{marked_answer(text)}}}")
    elif not boxes and "####" in text:
        answers = [f"${marked_answer(text)}$"]
    expected = marked_answer(solution) if "####" in solution else None
    equal = _POOL.compare(expected or solution, answers, timeout)
    if equal is None or (not equal and _WORDS.fullmatch(solution)):
        return float(is_exact_match(text, solution))
    return float(equal)


class _Worker:
    """
    One process that compares answers, used by one thread at a time.

    Args:
        timeout (`float`): The longest deadline it will be given, for the alarm that ends it should the parent be gone.
    """

    def __init__(self, timeout: float) -> None:
        package_home = str(Path(__file__).resolve().parents[2])
        environment = {
            "PYTHONPATH": package_home,
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
        }
        self.timeout = timeout
        self.pid = os.getpid()
        self._ids = itertools.count()
        self._buffer = b""
        self._process = subprocess.Popen(  # noqa: S603 (our own module, a list of arguments)
            [sys.executable, "-m", f"{__package__}._math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self._send({"memory": MEMORY, "alarm": int(timeout) + 5})
        hello = self._receive(time.monotonic() + STARTUP_TIMEOUT)
        if hello is None or "ready" not in hello:
            self.kill()
            raise MathWorkerError(f"The worker that compares answers did not start within {STARTUP_TIMEOUT:g} s.")
        if not hello["ready"]:
            self.kill()
            raise MissingExtraError("math-verify", "math")

    def compare(self, solution: str, answers: list[str], deadline: float) -> dict[str, Any] | None:
        """The worker's reply, or `None` if it died or is late."""
        number = next(self._ids)
        if not self._send({"id": number, "solution": solution, "answers": answers}):
            return None
        reply = self._receive(deadline)
        return reply if reply is not None and reply.get("id") == number else None

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and reaps it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _send(self, message: dict[str, Any]) -> bool:
        # A request of two texts fits the pipe or is read by a worker that waits for it; a dead one breaks the pipe.
        stdin: Any = self._process.stdin
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[stdin.write(data) :]
        except OSError:
            return False
        return True

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        stdout: Any = self._process.stdout
        descriptor = stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return None
            data = os.read(descriptor, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        return reply if isinstance(reply, dict) else None


class _Pool:
    """Workers that wait for the next comparison; grows with the number of threads that compare at once."""

    def __init__(self) -> None:
        self.failures = 0
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def compare(self, solution: str, answers: list[str], timeout: float) -> bool | None:
        """Whether both are equal; `None` if the solution is no mathematics; `False` if the worker had to be killed."""
        worker = self._take(timeout)
        reply = None
        try:
            reply = worker.compare(solution, answers, time.monotonic() + timeout)
        finally:
            if reply is None:
                worker.kill()
            else:
                with self._lock:
                    self._idle.append(worker)
        if reply is None:
            with self._lock:
                self.failures += 1
            shown = ascii(answers[-1][:_LOGGED_CHARACTERS])
            logger.warning(
                "Comparing an answer took more than %g s or the memory it may use, reward 0.0: %s", timeout, shown
            )
            return False
        if "error" in reply:
            logger.debug("math-verify raised %s for %s", reply["error"], ascii(answers[-1][:_LOGGED_CHARACTERS]))
            return False
        return None if reply["equal"] is None else bool(reply["equal"])

    def close(self) -> None:
        """Ends all waiting workers."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            if worker.pid == os.getpid():
                worker.kill()

    def _take(self, timeout: float) -> _Worker:
        while True:
            with self._lock:
                if not self._idle:
                    break
                worker = self._idle.pop()
            # A fork of this process may not use its parent's pipes.
            if worker.pid == os.getpid() and worker.timeout >= timeout and worker.is_alive():
                return worker
            if worker.pid == os.getpid():
                worker.kill()
        return _Worker(max(timeout, TIMEOUT))


_POOL = _Pool()
atexit.register(_POOL.close)
