"""Rows that wait for a place, and the prompts read for them, each of them once; knows no policy and no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .stepping import Read, SteppedModel


@dataclass(frozen=True)
class Entrants:
    """
    Rows whose prompts have been read.

    Args:
        rows (`torch.Tensor` of shape `[M]`, `torch.long`): Which of the call's.
        read ([`~stepping.Read`]): Of `P` prompts.
        prompt (`torch.Tensor` of shape `[M]`, `torch.long`): Each row's prompt, as an index into `read`.
        hidden, logits (`torch.Tensor` of shape `[P, H]` and `[P, V]`): They predict each prompt's next token.
        prompt_mean (`torch.Tensor` of shape `[P, H]`, *optional*): For policies that pool the prompt.
    """

    rows: torch.Tensor
    read: Read
    prompt: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    prompt_mean: torch.Tensor | None

    def last(self) -> Entrants:
        """The last prompt alone, for rows that are still to enter."""
        at = self.prompt[-1:]
        read = self.read.select(at)
        read.trim()
        return Entrants(self.rows[:0], read, at[:0], *self.seen(at))

    def seen(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states, logits and means for `prompt` `[M]`."""
        hidden, logits = (values[prompt.to(values.device)] for values in (self.hidden, self.logits))
        return (
            hidden,
            logits,
            None if self.prompt_mean is None else self.prompt_mean[prompt.to(self.prompt_mean.device)],
        )


class Queue:
    """
    Gives rows a place in their order, but those of a prompt together. A prompt of which rows have to wait is kept as it
    was read.

    Args:
        stepped ([`~stepping.SteppedModel`]): Reads.
        prompts (list of lists of `int`): Token ids.
        prompt_of (sequence of `int`): Each row's prompt, as an index into `prompts`.
    """

    def __init__(self, stepped: SteppedModel, prompts: list[list[int]], prompt_of: Sequence[int]) -> None:
        self._stepped, self._prompts, self._prompt_of = stepped, prompts, prompt_of
        first = {prompt: place for place, prompt in reversed(list(enumerate(prompt_of)))}
        self._waiting = sorted(range(len(prompt_of)), key=lambda row: first[prompt_of[row]])
        self._taken = 0
        self._kept: Entrants | None = None

    def __len__(self) -> int:
        return len(self._waiting) - self._taken

    def take(self, places: int) -> list[Entrants]:
        """The next rows, at most `places`: those whose prompt has been read before, and others."""
        rows = self._waiting[self._taken : self._taken + places]
        self._taken += len(rows)
        found, kept = [], self._kept
        if kept is not None:
            same = [row for row in rows if self._prompt_of[row] == self._prompt_of[rows[0]]]
            prompt = torch.zeros(len(same), dtype=torch.long, device=self._stepped.device)
            found.append(replace(kept, rows=torch.tensor(same, device=prompt.device), prompt=prompt))
            rows, self._kept = rows[len(same) :], None
        if rows:
            found.append(self._read(rows))
        if self._stepped.merges and len(self):
            row, following = self._waiting[self._taken - 1 : self._taken + 1]
            if self._prompt_of[row] == self._prompt_of[following]:
                self._kept = found[-1].last()
        return found

    def _read(self, rows: list[int]) -> Entrants:
        names = list(dict.fromkeys(self._prompt_of[row] for row in rows))
        places = {name: place for place, name in enumerate(names)}
        read, hidden, logits, mean = self._stepped.read([self._prompts[name] for name in names])
        at = self._stepped.device
        prompt = torch.tensor([places[self._prompt_of[row]] for row in rows], device=at)
        return Entrants(torch.tensor(rows, device=at), read, prompt, hidden, logits, mean)
