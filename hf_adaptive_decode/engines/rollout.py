"""Decodes many rows at once as one policy says, dropping rows as they end; knows policies and tokens, no text, no
tasks and no training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..policies import DecodingPolicy
from ..policies.action_policy import ActionPolicy
from ..policies.static import draw
from ..randomness import row_uniforms
from ..sampler import check_parameters, check_scores
from ..types import DecodeState, Observation, SamplingParameters
from ..warping import warp_logits
from .stepping import SteppedModel

_ACTION, _TOKEN = 0, 1
# Rows that have ended are dropped once they are this part of the batch: dropping copies the cache, as every step does.
_WORTH_DROPPING = 0.1


@dataclass(frozen=True)
class Rows:
    """
    What to decode: one row a completion.

    Args:
        prompts (list of lists of `int`): Token ids of each distinct prompt; each is read once, whatever its rows.
        prompt (`torch.Tensor` of shape `[R]`, `torch.long`): Each row's prompt, as an index into `prompts`.
        token_budget (`torch.Tensor` of shape `[R]`, `torch.long`): Each row's b.
        parallel_samples (`torch.Tensor` of shape `[R]`, `torch.long`): Each row's B, as the policy is told it.
        keys (`torch.Tensor` of shape `[R]`, `torch.long`): From [`row_key`]; all that a row's draws depend on.
    """

    prompts: list[list[int]]
    prompt: torch.Tensor
    token_budget: torch.Tensor
    parallel_samples: torch.Tensor
    keys: torch.Tensor

    def select(self, rows: torch.Tensor) -> Rows:
        """Some of the rows; `prompts` stay all."""
        columns = {name: value[rows] for name, value in vars(self).items() if name != "prompts"}
        return replace(self, **columns)


@dataclass(frozen=True)
class Decisions:
    """
    The choices of an action policy that it made itself: all that an update of it needs.

    Args:
        seen ([`Observation`]): What each of the `M` decisions was made on.
        action (`torch.Tensor` of shape `[M]`, `torch.long`): What was chosen.
        row, step (`torch.Tensor` of shape `[M]`, `torch.long`): Where.
    """

    seen: Observation
    action: torch.Tensor
    row: torch.Tensor
    step: torch.Tensor

    @staticmethod
    def join(parts: list[Decisions]) -> Decisions:
        """Several, one behind the other."""

        def column(name: str) -> torch.Tensor | None:
            values = [vars(part.seen)[name] for part in parts]
            return None if values[0] is None else torch.cat(values)

        context = torch.cat([part.seen.context for part in parts])
        seen = Observation(context, column("remaining_tokens"), column("parallel_samples"))
        rest = {name: torch.cat([vars(part)[name] for part in parts]) for name in ("action", "row", "step")}
        return Decisions(seen, **rest)


@dataclass(frozen=True)
class Decoded:
    """
    Completions, with -1 (NaN for floats) after a row's end.

    Args:
        tokens (`torch.Tensor` of shape `[R, T]`, `torch.long`): New tokens, the end-of-sequence token included.
        lengths (`torch.Tensor` of shape `[R]`, `torch.long`): How many.
        ended (`torch.Tensor` of shape `[R]`, `torch.bool`): Whether the row ended by itself within its budget.
        temperature, top_p (`torch.Tensor` of shape `[R, T]`, `torch.float32`, *optional*): What was sampled with.
        action (`torch.Tensor` of shape `[R, T]`, `torch.long`, *optional*): Action taken, -1 where masked.
        decisions ([`Decisions`], *optional*): For training.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    temperature: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    action: torch.Tensor | None = None
    decisions: Decisions | None = None


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    policy: DecodingPolicy,
    rows: Rows,
    *,
    ends: set[int],
    pad: int,
    records: str | None = None,
    drops_ended: bool = True,
) -> Decoded:
    """
    One completion of each row.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base (or the adaptive model), in evaluation mode.
        policy ([`DecodingPolicy`]): Decides; in evaluation mode.
        rows ([`Rows`]): What to decode.
        ends (set of `int`): Tokens that end a row.
        pad (`int`): Fills the left of shorter prompts.
        records (`str`, *optional*): `"parameters"` of every token, or `"decisions"` of an action policy.
        drops_ended (`bool`, defaults to `True`): Whether ended rows leave the batch and the cache (Appendix D.1).

    Raises:
        [`LogitsError`]: If the model's logits or the policy's parameters are not finite; names step and row.
    """
    with SteppedModel(model, policy.config.pooling == "mean") as stepped:
        return _Decoding(stepped, policy, rows, ends, pad, records, drops_ended).run()


class _Decoding:
    """The state of one call; `at` holds, for each row of the shrinking batch, which row of the call it is."""

    def __init__(
        self,
        stepped: SteppedModel,
        policy: DecodingPolicy,
        rows: Rows,
        ends: set[int],
        pad: int,
        records: str | None,
        drops_ended: bool,
    ) -> None:
        self.stepped, self.policy, self.rows, self.pad = stepped, policy, rows, pad
        self.records, self.drops_ended = records, drops_ended
        count, longest = len(rows.keys), int(rows.token_budget.max())
        device = rows.keys.device
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self.at = torch.arange(count, device=device)
        self.going = torch.ones(count, dtype=torch.bool, device=device)
        self.tokens = torch.full((count, longest), -1, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.held: SamplingParameters | None = None
        self.traces: dict[str, torch.Tensor] = {}
        if records == "parameters":
            nothing = torch.full((count, longest), float("nan"), device=device)
            self.traces = {"temperature": nothing, "top_p": nothing.clone()}
            if policy.has_actions:
                self.traces["action"] = torch.full((count, longest), -1, device=device)
        self.decisions: list[Decisions] = []

    def run(self) -> Decoded:
        self.policy.warn_beyond(int(self.rows.token_budget.max()), int(self.rows.parallel_samples.max()))
        hidden, logits = self.stepped.prefill(self.rows.prompts, self.pad)
        repeated = self.rows.prompt.to(logits.device)
        self.stepped.select(repeated)
        hidden, logits = hidden[repeated.to(hidden.device)], logits[repeated]
        now = self.rows
        step = 0
        while True:
            tokens = self._choose(step, now, hidden, logits)
            self.tokens[self.at[self.going], step] = tokens[self.going]
            finished = self.going & torch.isin(tokens, self.ends)
            self.ended[self.at[finished]] = True
            step += 1
            self.going = self.going & ~finished & (now.token_budget > step)
            going = int(self.going.sum())
            if going == 0:
                break
            if self.drops_ended and going <= (1 - _WORTH_DROPPING) * len(self.going):
                kept = self.going.nonzero().squeeze(-1)
                now, tokens = self._shrink(kept, now, tokens)
            hidden, logits = self.stepped.step(tokens, self.going)
        return self._result(step)

    def _choose(self, step: int, now: Rows, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row, `[N]`."""
        named = torch.where(self.going, self.at, -1)
        check_scores(logits, step, named)
        state = DecodeState(
            hidden,
            logits,
            remaining_tokens=(now.token_budget - step).clamp(min=0).to(hidden.device),
            parallel_samples=now.parallel_samples.to(hidden.device),
            prompt_mean=self.stepped.prompt_mean,
            uniform=row_uniforms(now.keys, step, _ACTION).to(hidden.device),
        )
        parameters = self.held
        if parameters is None:
            parameters = self._decide(step, state)
            check_parameters(parameters, step, named)
            self.held = parameters if self.policy.decides_once else None
        self._trace(step, parameters)
        parameters = parameters.to(logits.device)
        if not isinstance(parameters.temperature, torch.Tensor) and parameters.temperature == 0:
            return logits.argmax(-1).to(now.keys.device)
        probabilities = warp_logits(logits, parameters).softmax(-1)
        return draw(probabilities, row_uniforms(now.keys, step, _TOKEN)).to(now.keys.device)

    def _decide(self, step: int, state: DecodeState) -> SamplingParameters:
        if self.records != "decisions" or not isinstance(self.policy, ActionPolicy):
            decided: SamplingParameters = self.policy(state)
            return decided
        parameters, seen = self.policy.decide(state)
        action: Any = parameters.action
        own = (action >= 0) & self.going.to(action.device)
        where = own.nonzero().squeeze(-1)
        if len(where):
            row = self.at[where.to(self.at.device)]
            self.decisions.append(Decisions(seen.select(where), action[where], row, torch.full_like(row, step)))
        return parameters

    def _trace(self, step: int, parameters: SamplingParameters) -> None:
        off = {"temperature": 1.0, "top_p": 1.0}
        for name, column in self.traces.items():
            value = vars(parameters)[name]
            value = torch.as_tensor(off[name] if value is None else value, device=column.device).to(column.dtype)
            column[self.at[self.going], step] = value.expand(len(self.at))[self.going]

    def _shrink(self, kept: torch.Tensor, now: Rows, tokens: torch.Tensor) -> tuple[Rows, torch.Tensor]:
        self.stepped.select(kept.to(self.stepped.ids.device))
        self.at, self.going = self.at[kept], self.going[kept]
        if self.held is not None:
            self.held = self.held.select(kept)
        return now.select(kept), tokens[kept]

    def _result(self, steps: int) -> Decoded:
        tokens = self.tokens[:, :steps]
        traces = {name: column[:, :steps] for name, column in self.traces.items()}
        decisions = Decisions.join(self.decisions) if self.decisions else None
        return Decoded(tokens, (tokens >= 0).sum(1), self.ended, decisions=decisions, **traces)
