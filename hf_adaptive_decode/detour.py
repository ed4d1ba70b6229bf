"""A call of a module that runs something else for a while; knows no model and no loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_INSTEAD: ContextVar[Callable[[], Any] | None] = ContextVar("hf_adaptive_decode_instead", default=None)


class Detour:
    """A mix-in for a module class: within [`~running_instead`] a call of the module runs a job of the caller's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, but for a job."""
        # Compiled code knows no context, and no trainer compiles its loss.
        job = None if torch.compiler.is_dynamo_compiling() else _INSTEAD.get()
        return super().__call__(*args, **kwargs) if job is None else job()  # type: ignore[misc]

    @contextmanager
    def running_instead(self, job: Callable[[], Any]) -> Iterator[None]:
        """
        Within it a call of the model runs `job`: a trainer's loss, which so is the forward of whatever wraps the model.

        Wrappers that average gradients over processes look at what comes out of the forward of what they wrap, and an
        adapter's loss reads recorded states and never the base.
        """

        def once() -> Any:
            inside = _INSTEAD.set(None)  # the job itself may run the model
            try:
                return job()
            finally:
                _INSTEAD.reset(inside)

        token = _INSTEAD.set(once)
        try:
            yield
        finally:
            _INSTEAD.reset(token)
