"""Forward passes of a model whose layers are spread over processes, each of which has to take part in every pass; knows
models and processes, nothing of what passes are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn


class Lockstep:
    """
    Lets processes need different numbers of forward passes of one sharded model.

    Within [`~Lockstep.phase`] every pass is announced. A process that needs no more of them goes on with passes of a
    single token, whose results nobody reads, until no process needs one.

    Args:
        model (`nn.Module`, *optional*): The sharded model; `None` for one that every process holds whole, where there
            is nothing to be done.
        device (`torch.device`, *optional*): Where processes exchange numbers.
    """

    def __init__(self, model: nn.Module | None = None, device: torch.device | None = None) -> None:
        self._model, self._device = model, device
        self._inside = self._idle = False
        if model is not None:
            # Before the hooks that bring a layer's parts together: whoever waits for numbers expects these first.
            model.register_forward_pre_hook(self._announce, prepend=True)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """All processes enter it together, and leave it together once none needs another pass."""
        if self._model is None or self._inside:
            yield
            return
        self._inside = True
        try:
            yield
            # Not after an error: it ends this process, and with it all others.
            self._wait()
        finally:
            self._inside = self._idle = False

    def _announce(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._inside and not self._idle:
            self._count(1)

    @torch.no_grad()
    def _wait(self) -> None:
        self._idle = True
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        while int(self._count(0)):
            self._model(input_ids=token)  # type: ignore[misc]

    def _count(self, own: int) -> torch.Tensor:
        """How many processes need a pass. Nobody waits for the number but who reads it."""
        needed = torch.tensor(own, device=self._device)
        distributed.all_reduce(needed)
        return needed
