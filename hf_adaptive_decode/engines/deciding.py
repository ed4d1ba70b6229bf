"""What policies that decide once say of rows, from their prompts alone, for hosts that take one configuration a
request; knows models and policies, no host.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checks import check_parameters, check_scores
from ..policies import DecodingPolicy, StaticPolicy
from ..policies.action_policy import ActionPolicy
from ..randomness import row_uniforms
from ..types import DecodeState, SamplingParameters, is_per_row
from .places import FOR_ACTION
from .records import Decisions, Rows
from .stepping import SteppedModel


def decides_here(policy: DecodingPolicy) -> bool:
    """Whether a row keeps what is decided at its first step."""
    alone = isinstance(policy, StaticPolicy) and policy.weights.numel() == 1 and not policy.needs_logits
    return policy.decides_once or alone


@torch.no_grad()
def decide_first(
    model: PreTrainedModel, policy: DecodingPolicy, rows: Rows, pad: int, batch_rows: int | None = None
) -> tuple[SamplingParameters, Decisions | None]:
    """
    What a policy that [`decides_here`] says at each row's first step, and the decisions of an action policy: exactly
    those that [`~engines.rollout.decode`] would take and record.

    Args:
        model ([`~transformers.PreTrainedModel`]): Reads each distinct prompt once, if the policy looks at prompts.
        policy ([`DecodingPolicy`]): In evaluation mode.
        rows ([`Rows`]): Which.
        pad (`int`): Fills the left of shorter prompts.
        batch_rows (`int`, *optional*): Most prompts read at once; all of them by default.

    Returns:
        [`SamplingParameters`] with fields of shape `[R]` or `None`, and the decisions by row, `None` if there are none.
    """
    parts: list[SamplingParameters] = []
    taken: list[Decisions] = []
    order: list[torch.Tensor] = []
    for at, state in _first_states(model, policy, rows, pad, batch_rows or len(rows.prompts)):
        if isinstance(policy, ActionPolicy):
            parameters, seen = policy.decide(state)
            action: Any = parameters.action
            own = (action >= 0).nonzero().squeeze(-1)
            if len(own):
                where = at[own.to(at.device)]
                taken.append(Decisions(seen.select(own), action[own], where, torch.zeros_like(where)))
        else:
            parameters = policy(state)
        check_parameters(parameters, 0, at)
        parts.append(parameters)
        order.append(at)
    back = torch.cat(order).argsort()
    return _joined(parts, [len(at) for at in order]).select(back), Decisions.in_order(taken)


def _first_states(model: PreTrainedModel, policy: DecodingPolicy, rows: Rows, pad: int, size: int) -> Any:
    """Numbers of rows, `[M]`, and their states at the first step."""
    on = model.device
    if isinstance(policy, StaticPolicy) and not policy.needs_logits:
        at = torch.arange(len(rows.keys), device=rows.keys.device)
        yield at, _state(rows, at, torch.empty(len(at), 0, device=on))
        return
    with SteppedModel(model, pad, policy.pools_prompt) as stepped:
        for first in range(0, len(rows.prompts), size):
            _, hidden, logits, mean = stepped.read(rows.prompts[first : first + size])
            at = ((rows.prompt >= first) & (rows.prompt < first + size)).nonzero().squeeze(-1)
            place = rows.prompt[at] - first
            maxima = check_scores(logits, 0)
            seen = {"logits": logits, "prompt_mean": mean, "maxima": maxima}
            picked: dict[str, Any] = {n: None if v is None else v[place.to(v.device)] for n, v in seen.items()}
            yield at, _state(rows, at, hidden[place.to(hidden.device)], **picked)


def _state(rows: Rows, at: torch.Tensor, hidden: torch.Tensor, **seen: Any) -> DecodeState:
    own = {name: vars(rows)[name][at].to(hidden.device) for name in ("token_budget", "parallel_samples", "keys")}
    uniform = row_uniforms(own["keys"], 0, FOR_ACTION)
    return DecodeState(
        hidden, remaining_tokens=own["token_budget"], parallel_samples=own["parallel_samples"], uniform=uniform, **seen
    )


def _joined(parts: list[SamplingParameters], lengths: list[int]) -> SamplingParameters:
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(SamplingParameters)):
        values = [vars(part)[name] for part in parts]
        if values[0] is not None:
            spread = [v if is_per_row(v) else torch.full((n,), v) for v, n in zip(values, lengths, strict=True)]
            columns[name] = torch.cat([torch.as_tensor(value) for value in spread])
    return SamplingParameters(**columns)
