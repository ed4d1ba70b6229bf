"""Rows sampled within transformers' continuous batching as the decode loop would sample them, token for token; knows
requests and policies, nothing of scheduling.
"""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_parameters, check_scores
from ..policies import DecodingPolicy
from ..policies.action_policy import ActionPolicy
from ..policies.static import draw
from ..randomness import row_uniforms
from ..request_sampler import BatchTap, Column, Last, asked, remaining_tokens
from ..request_slots import HeldDecisions
from ..types import DecodeState, SamplingParameters
from ..warping import warp_logits
from .places import FOR_ACTION, FOR_TOKEN
from .records import NOTHING, OFF, Decisions, Rows, traced

_NO_ROW = -1


class RowSampler:
    """
    Draws each request's tokens by its row's own random numbers, and leaves continuous batching nothing to draw.

    Args:
        model ([`~transformers.PreTrainedModel`]): Its output embedding is read.
        policy ([`DecodingPolicy`]): Decides; in evaluation mode.
        rows ([`Rows`]): A request names its row as `row`.
        records (`str`): `"parameters"` of every token, or `"decisions"` of an action policy.

    Attributes:
        processors (list): For the end of a manager's.
        error (`Exception`, *optional*): What went wrong in the manager's thread.
        written (`dict`): By name, what is kept of every token, `[rows + 1, longest + 1]`.
        decisions (list of [`Decisions`]): As they were made.
    """

    def __init__(self, model: Any, policy: DecodingPolicy, rows: Rows, records: str) -> None:
        self._policy, self._records = policy, records
        on = model.device
        # One more, for what belongs to no request.
        none = torch.zeros(1, dtype=torch.long, device=on)
        self._keys, self._budget, self._samples = (
            torch.cat([column.to(on), none]) for column in (rows.keys, rows.token_budget, rows.parallel_samples)
        )
        shape = (len(rows.keys) + 1, int(rows.token_budget.max()) + 1)
        kept = traced(policy) if records == "parameters" else ()
        self.written = {name: torch.full(shape, NOTHING[name], device=on) for name in kept}
        self.decisions: list[Decisions] = []
        self.error: Exception | None = None
        self._held = HeldDecisions(len(self._keys))
        self._row = Column(asked("row", _NO_ROW), _NO_ROW, torch.int32, row=int)
        self._remaining = Column(remaining_tokens, 1, torch.int32)
        self.processors = [self._row, self._remaining, Last(self._sample)]
        self._tap = BatchTap(model)

    def close(self) -> None:
        """Removes the hooks."""
        self._tap.close()

    def _sample(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[N, V]`, finite in the column of each row's token alone."""
        try:
            tokens = self._choose(scores)
        except Exception as error:  # the manager's thread would turn it into a text
            self.error = error
            raise
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    @torch.no_grad()
    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        names = self._row.values.long()
        row = torch.where(names < 0, len(self._keys) - 1, names)
        remaining = self._remaining.values.long()
        step = (self._budget[row] - remaining).clamp(min=0)
        hidden = self._tap.take()
        maxima = check_scores(scores, step, names)
        for_action, for_token = (row_uniforms(self._keys[row], step, stream) for stream in (FOR_ACTION, FOR_TOKEN))
        state = DecodeState(hidden, scores, remaining, self._samples[row], uniform=for_action, maxima=maxima)
        parameters = self._decide(state, names, row, step)
        check_parameters(parameters, step, names)
        for name, column in self.written.items():
            value = vars(parameters)[name]
            value = torch.as_tensor(OFF[name] if value is None else value, device=column.device)
            column[row, step] = value.to(column.dtype).expand(len(row))
        if not isinstance(parameters.temperature, torch.Tensor) and parameters.temperature == 0:
            return scores.argmax(-1)
        return draw(warp_logits(scores, parameters, maxima=maxima).softmax(-1), for_token)

    def _decide(
        self, state: DecodeState, names: torch.Tensor, row: torch.Tensor, step: torch.Tensor
    ) -> SamplingParameters:
        once = self._policy.decides_once
        if self._records != "decisions" or not isinstance(self._policy, ActionPolicy):
            parameters: SamplingParameters = self._policy(state)
        else:
            parameters, seen = self._policy.decide(state)
            action: Any = parameters.action
            where = ((action >= 0) & (names >= 0) & ((step == 0) | (not once))).nonzero().squeeze(-1)
            if len(where):
                self.decisions.append(Decisions(seen.select(where), action[where], row[where], step[where]))
        return self._held.keep(parameters, row, step == 0) if once else parameters
