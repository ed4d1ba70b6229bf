"""Brings a wrapped model's hidden states to the `generate` call that they belong to; knows no policy, no sampling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from .tap import output_embedding


class Listener(Protocol):
    """A `generate` call that wants to hear its model's forward passes."""

    def hear(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Takes hidden states `[rows, length, H]`; what it returns enters the output embedding in their place."""


_CURRENT: ContextVar[Any] = ContextVar("hf_adaptive_decode_call", default=None)
# A model that can be copied holds no lock.
_ONE_AT_A_TIME = threading.Lock()
_DRAFTING: ContextVar[bool] = ContextVar("hf_adaptive_decode_drafting", default=False)


def current_call() -> Any:
    """The `generate` call that this thread is in, `None` outside of one and while a draft is made for it."""
    return _CURRENT.get()


def is_drafting() -> bool:
    """Whether this thread makes a draft for another call, which no adapter takes part in."""
    return _DRAFTING.get()


@contextmanager
def listening(call: Listener) -> Iterator[None]:
    """Within it this thread's forward passes are `call`'s."""
    token, draft = _CURRENT.set(call), _DRAFTING.set(False)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        _DRAFTING.reset(draft)


@contextmanager
def drafting() -> Iterator[None]:
    """Within it nobody hears this thread's forward passes, and `generate` is the base model's own."""
    token, draft = _CURRENT.set(None), _DRAFTING.set(True)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        _DRAFTING.reset(draft)


class Capture:
    """
    The one hook of a wrapped model, on the input of its output embedding, as long as it is wrapped.

    It stays between calls because compiled code keeps the hooks that it was traced with: one that came and went would
    be compiled away, or compiled in for ever.
    """

    def __init__(self) -> None:
        self.compiled: torch.Tensor | None = None
        self._layer: nn.Module | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Sets the hook, and moves it if the model has another output embedding by now."""
        layer = output_embedding(model)
        if layer is not self._layer:
            self.detach()
            self._layer, self._handle = layer, layer.register_forward_pre_hook(self._hear)

    def detach(self) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._layer = self._handle = self.compiled = None

    def take_compiled(self) -> torch.Tensor | None:
        """The hidden states of a compiled forward pass since this was last asked, if there was one."""
        hidden, self.compiled = self.compiled, None
        return hidden

    def handing_over(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled forward pass that leaves its hidden states with this thread's call before another begins."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with _ONE_AT_A_TIME:
                output = compiled(*args, **kwargs)
                hidden, call = self.take_compiled(), _CURRENT.get()
            if hidden is not None and call is not None:
                call.hear(hidden)
            return output

        return run

    def _hear(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_dynamo_compiling():
            # A compiled graph knows no context; it leaves the tensor where the call will look for it.
            self.compiled = args[0]
            return None
        call = _CURRENT.get()
        if call is not None:
            self.compiled = None  # of an earlier pass, then
        instead = None if call is None else call.hear(args[0])
        return None if instead is None else (instead, *args[1:])
