"""The decode loop: a batch of rows that have places, and a queue of those that wait; knows policies and tokens, nothing
of who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..checks import check_parameters, check_scores
from ..policies import DecodingPolicy
from ..policies.action_policy import ActionPolicy
from ..policies.static import draw
from ..types import DecodeState, SamplingParameters
from ..warping import warp_logits
from .places import Places
from .queueing import Entrants, Queue
from .records import NOTHING, OFF, Decisions, Decoded, Rows, traced
from .stepping import Read, SteppedModel

# Rows that have ended are dropped once they are this part of the batch: dropping copies the cache.
_WORTH_DROPPING = 0.1


class Decoding:
    """
    One call of [`~rollout.decode`], whose arguments it takes.

    Attributes:
        kept (`dict`): What is kept of every token, and what stands in its place after a row's end.
        longest (`int`): The largest token budget.
        decisions (list of [`~records.Decisions`]): Of all rows so far, as they were made.
    """

    def __init__(
        self,
        stepped: SteppedModel,
        policy: DecodingPolicy,
        rows: Rows,
        ends: set[int],
        records: str | None,
        drops_ended: bool,
        batch_rows: int | None,
        patience: float,
    ) -> None:
        self._stepped, self._policy, self._records = stepped, policy, records
        self._drops_ended, self._patience = drops_ended, patience
        self._size = len(rows.keys) if batch_rows is None else batch_rows
        self._home, on = rows.keys.device, stepped.device
        names = ("keys", "token_budget", "parallel_samples")
        self._columns = {name: vars(rows)[name].to(on) for name in names}
        self._queue = Queue(stepped, rows.prompts, rows.prompt.tolist())
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=on)
        self.kept = {name: NOTHING[name] for name in ("tokens", *(traced(policy) if records == "parameters" else ()))}
        self.longest = int(rows.token_budget.max())
        self.decisions: list[Decisions] = []
        policy.warn_beyond(self.longest, int(rows.parallel_samples.max()))

    def run(self) -> Iterator[tuple[torch.Tensor, Decoded]]:
        """Hands over rows that have ended, with their numbers in the call."""
        refills = self._stepped.merges and self._drops_ended
        while len(self._queue):
            now, read = self._begin(*self._queue.take(self._size))
            idle = 0
            while True:
                free, waiting = len(now.row) - now.count, refills and len(self._queue) > 0
                idle += free
                if waiting and free and (idle >= self._patience * len(now.row) or not now.count):
                    yield from self._hand_over(now)
                    now, idle = self._refill(now, read), 0
                    continue
                if not now.count:
                    break
                if self._drops_ended and not waiting and free >= _WORTH_DROPPING * len(now.row):
                    yield from self._hand_over(now)
                    now = self._shrink(now, read, now.going.nonzero().squeeze(-1))
                hidden, logits = self._stepped.step(read, now.newest, now.going)
                # Policies that pool the prompt decide once, at a row's first step.
                self._choose(now, hidden, logits, None)
                del hidden, logits
            yield from self._hand_over(now)

    def _begin(self, entrants: Entrants) -> tuple[Places, Read]:
        now = self._first_step(entrants)
        entrants.read.keep(entrants.prompt)
        return now, entrants.read

    def _refill(self, now: Places, read: Read) -> Places:
        """Rows that wait take the free places; places that nobody wants are given up."""
        free = (~now.going).nonzero().squeeze(-1)
        read.vacate(free)
        for entrants in self._queue.take(len(free)):
            count = len(entrants.rows)
            others = self._first_step(entrants)
            read.take(free[:count], entrants.read, entrants.prompt)
            now.take(free[:count], others)
            free = free[count:]
        if not len(free):
            return now
        wanted = torch.ones_like(now.going).index_fill_(0, free, False)
        return self._shrink(now, read, wanted.nonzero().squeeze(-1))

    def _shrink(self, now: Places, read: Read, kept: torch.Tensor) -> Places:
        read.keep(kept)
        if self._stepped.merges:
            read.trim()
        return now.select(kept)

    def _first_step(self, entrants: Entrants) -> Places:
        """Rows with their first token, which what was read of their prompts predicts."""
        now = Places.begin(entrants.rows, self._columns, self.longest, self.kept)
        self._choose(now, *entrants.seen(entrants.prompt))
        return now

    def _choose(self, now: Places, hidden: torch.Tensor, logits: torch.Tensor, mean: torch.Tensor | None) -> None:
        """The next token of each row."""
        maxima = check_scores(logits, now.step, now.names)
        for_action, for_token = now.uniforms()
        parameters = now.held
        if parameters is None:
            state = DecodeState(
                hidden,
                logits,
                remaining_tokens=(now.token_budget - now.step).to(hidden.device),
                parallel_samples=now.parallel_samples.to(hidden.device),
                prompt_mean=mean,
                uniform=for_action.to(hidden.device),
                maxima=maxima,
            )
            parameters = self._decide(now, state)
            check_parameters(parameters, now.step, now.names)
            now.held = parameters if self._policy.decides_once else None
        for name in self.kept:
            if name != "tokens":
                value = vars(parameters)[name]
                value = torch.as_tensor(OFF[name] if value is None else value).expand(len(now.row))
                now.write(name, value, NOTHING[name])
        parameters = parameters.to(logits.device)
        if not isinstance(parameters.temperature, torch.Tensor) and parameters.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(warp_logits(logits, parameters, inplace=True, maxima=maxima).softmax(-1), for_token)
        now.advance(tokens.to(now.row.device), self._ends)

    def _decide(self, now: Places, state: DecodeState) -> SamplingParameters:
        if self._records != "decisions" or not isinstance(self._policy, ActionPolicy):
            decided: SamplingParameters = self._policy(state)
            return decided
        parameters, seen = self._policy.decide(state)
        action: Any = parameters.action
        own = action >= 0
        if not now.all_going:
            own = own & now.going.to(own.device)
        where = own.nonzero().squeeze(-1)
        if len(where):
            at = where.to(now.row.device)
            row, step = now.row[at].to(self._home), now.step[at].to(self._home)
            self.decisions.append(Decisions(seen.select(where), action[where], row, step))
        return parameters

    def _hand_over(self, now: Places) -> Iterator[tuple[torch.Tensor, Decoded]]:
        """The rows that have ended; the caller then gives their places away, or gives them up."""
        done = (~now.going).nonzero().squeeze(-1)
        if not len(done):
            return
        at, lengths, ended = (column[done].to(self._home) for column in (now.row, now.step, now.ended))
        longest = int(lengths.max())
        written: dict[str, Any] = {n: column[done, :longest].to(self._home) for n, column in now.written.items()}
        yield at, Decoded(lengths=lengths, ended=ended, **written)
