"""What is decoded and what comes of it, as tensors of one row a completion; knows no model, no engine and no text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..policies import DecodingPolicy
from ..types import Observation

# What a parameter that a policy leaves out means, and what stands behind a row's end.
OFF = {"temperature": 1.0, "top_p": 1.0}
NOTHING = {"tokens": -1, "temperature": float("nan"), "top_p": float("nan"), "action": -1}


def traced(policy: DecodingPolicy) -> tuple[str, ...]:
    """What is kept of every token besides itself."""
    return ("temperature", "top_p", *(("action",) if policy.has_actions else ()))


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

    @staticmethod
    def in_order(parts: list[Decisions]) -> Decisions | None:
        """All of them by step, then by row, however they came, or `None` if there are none; empties `parts`."""
        if not parts:
            return None
        whole = Decisions.join(parts)
        parts.clear()  # else what was seen would lie in the memory three times
        rank = whole.step * (int(whole.row.max()) + 1) + whole.row
        if bool((rank[1:] > rank[:-1]).all()):
            return whole
        order = rank.argsort()
        seen = whole.seen.select(order.to(whole.seen.context.device))
        return Decisions(seen, whole.action[order.to(whole.action.device)], whole.row[order], whole.step[order])


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
