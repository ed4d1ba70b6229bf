"""Decoders that take turns token by token: each `generate` in a thread of its own, which waits after every token; knows
streamers and clocks and nothing of what is generated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from measure import Timer, rotated
from transformers.generation.streamers import BaseStreamer

# A `generate` call that hands its tokens to the streamer it is given.
Decoder = Callable[[BaseStreamer], Any]


class _Stopped(Exception):  # noqa: N818
    """Another contender failed, and this one is not waited for."""


class Baton(BaseStreamer):
    """Times what lies between two tokens, and lets the thread go on when it is its turn again."""

    def __init__(self, timer: Timer, waits: bool = True) -> None:
        self.seconds: list[float] = []
        self.forward_seconds: list[float] = []
        self.error: BaseException | None = None
        self.stops = False
        self._timer, self._waits = timer, waits
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._start = self._forward = 0.0

    @contextmanager
    def timing_forward(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, the model's forward passes in the contender's thread are timed, as part of its tokens."""
        me, began = threading.get_ident(), [0.0]

        def begin(*_: Any) -> None:
            if threading.get_ident() == me:
                self._timer.wait()
                began[0] = time.perf_counter()

        def end(*_: Any) -> None:
            if threading.get_ident() == me:
                self._timer.wait()
                self._forward += time.perf_counter() - began[0]

        hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def put(self, value: Any) -> None:
        """The prompt at first, then each token."""
        self._timer.wait()
        self.seconds.append(time.perf_counter() - self._start)
        self.forward_seconds.append(self._forward)
        self._forward = 0.0
        if self._waits:
            self._done.release()
            self.wait_for_turn()
        self._start = time.perf_counter()

    def end(self) -> None:
        """There is nothing to hand over any more."""

    def wait_for_turn(self) -> None:
        """In the contender's thread."""
        self._go.acquire()
        if self.stops:
            raise _Stopped
        self._start = time.perf_counter()

    def give_turn(self) -> None:
        """In the main thread: until the contender has made its next token."""
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def run(self, decode: Decoder, model: torch.nn.Module, threads: int) -> None:
        """The contender's thread; how many threads an operation takes is a matter of the thread that calls it."""
        torch.set_num_threads(threads)
        try:
            self.wait_for_turn()
            with self.timing_forward(model):
                decode(self)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._done.release()

    def finish(self) -> None:
        """Lets the thread run to its end, whatever it is at."""
        self.stops = True
        self._go.release()


def in_turns(
    decoders: Mapping[str, tuple[Decoder, torch.nn.Module]],
    tokens: int,
    discard: int,
    timer: Timer,
    limit: float,
    at_least: int = 7,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """
    Seconds of each token of each decoder, the first `discard` left out, and what of them its model's forward pass took:
    in each round each makes one token.

    Every decoder has to make at least `tokens` tokens. After `limit` seconds no round is begun that is not needed to
    have `at_least` of them.
    """
    batons = {name: Baton(timer) for name in decoders}
    threads = [
        threading.Thread(target=batons[name].run, args=(decode, model, torch.get_num_threads()))
        for name, (decode, model) in decoders.items()
    ]
    for thread in threads:
        thread.start()
    try:
        start = time.perf_counter()
        for number in range(tokens + 1):  # the prompt comes first
            if number > discard + at_least and time.perf_counter() - start > limit:
                break
            for name in rotated(list(batons), number):
                batons[name].give_turn()
    finally:
        for baton in batons.values():
            baton.finish()
        for thread in threads:
            thread.join()
    first = 1 + discard
    seconds = {name: baton.seconds[first:] for name, baton in batons.items()}
    return seconds, {name: baton.forward_seconds[first : first + len(seconds[name])] for name, baton in batons.items()}


def alone(decode: Decoder, discard: int, timer: Timer) -> list[float]:
    """Seconds of each token of a decoder that has the machine and the main thread for itself."""
    baton = Baton(timer, waits=False)
    decode(baton)
    return baton.seconds[1 + discard :]
