r"""
The ranking loss between versions of a prompt that ask for less or more diversity (AutoDeco, section 3.3); it knows
means of T and P over rows of tokens, no prompts and no model.

The paper says that a ranking loss makes T and P lower under a low-diversity command and higher under a high-diversity
one, and gives neither its form nor a margin. Here it is a hinge for each pair of a command with its baseline:

    low:   relu(mean T_low + margin - mean T_base)        high:   relu(mean T_base + margin - mean T_high)

with the same of P added, so a pair that is ordered by its margin has no loss and no gradient. The gradient reaches the
baseline, too: held constant, it is left to drift with whatever moves the commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .chunked import CHUNK_BYTES, Project

PredictVersion = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor | None, torch.Tensor | None]]

# Rows of the first chunk when the vocabulary's size is still unknown.
_FIRST_CHUNK = 16


@dataclass(frozen=True)
class RankingLossConfig:
    """
    How far apart the versions of a prompt have to be, and what the ranking loss weighs beside the decoding loss.

    The paper leaves both margins and the weight unspecified; these are this library's, no larger than the differences
    that its Table 4 reports.

    Args:
        temperature_margin (`float`, *optional*, defaults to 0.1): Least difference of the mean T, at least 0.
        top_p_margin (`float`, *optional*, defaults to 0.02): Least difference of the mean P, at least 0.
        weight (`float`, *optional*, defaults to 1.0): Factor of the ranking loss in a total loss, at least 0.
    """

    temperature_margin: float = 0.1
    top_p_margin: float = 0.02
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0. Got {value!r}.")


@dataclass(frozen=True)
class RowMeans:
    """What a policy says on average over the tokens of each of `R` rows; `None` for a parameter not predicted."""

    # float32 [R], with the policy's graph; 0 for a row without tokens
    temperature: torch.Tensor | None
    # the same
    top_p: torch.Tensor | None
    # bool [R]: whether the row has a token
    present: torch.Tensor


@dataclass(frozen=True)
class RankingLossOutput:
    """The loss and what a trainer logs of it."""

    # sum of the pairs' hinges / num_pairs, float32 [], with the graph of the means
    loss: torch.Tensor
    # pairs of a command with its baseline that both have tokens
    n_pairs: int
    # sum of the pairs' hinges, float32 [] without graph
    loss_sum: torch.Tensor


def mean_predictions(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    count: int,
    predict: PredictVersion,
    project: Project | None = None,
    *,
    chunk_size: int | None = None,
) -> RowMeans:
    """
    Mean T and P over the tokens of each row; of logits, only one chunk's exist at a time, and none unless asked for.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`): Hidden states that predict the tokens, of all rows together.
        rows (`torch.Tensor` of shape `[N]`, long): Which row each of them belongs to.
        count (`int`): How many rows there are, those without tokens included.
        predict (`Callable`): `predict(hidden [C, H], logits [C, V] or None) -> (temperature [C], top_p [C])`, each or
            `None`. The gradient reaches the hidden states as far as they have a graph.
        project (`Callable`, *optional*): `project(hidden [C, H]) -> logits [C, V]`, for policies that read logits.
        chunk_size (`int`, *optional*): Tokens a call of `predict`; by default all of them, or with `project` as many
            as fit `CHUNK_BYTES` of float32 logits.

    Returns:
        [`RowMeans`]. Without any token its means are zeros that still reach the policy's parameters.
    """
    total = hidden.shape[0]
    size = chunk_size or (max(total, 1) if project is None else _FIRST_CHUNK)
    temperatures: list[torch.Tensor | None] = []
    top_ps: list[torch.Tensor | None] = []
    start = 0
    while start < total or start == 0:
        part = hidden[start : start + size]
        logits = None
        if project is not None:
            with torch.no_grad():
                logits = project(part)
        temperature, top_p = predict(part, logits)
        temperatures.append(temperature)
        top_ps.append(top_p)
        start += size
        if chunk_size is None and logits is not None:
            size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    tokens = torch.zeros(count, device=hidden.device).index_add(0, rows, torch.ones(total, device=hidden.device))

    def mean(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        known = [part for part in parts if part is not None]
        if not known:
            return None
        values = torch.cat(known)
        return values.new_zeros(count).index_add(0, rows, values) / tokens.clamp(min=1).to(values.dtype)

    return RowMeans(mean(temperatures), mean(top_ps), tokens > 0)


def ranking_loss(
    low: RowMeans,
    baseline: RowMeans,
    high: RowMeans,
    config: RankingLossConfig | None = None,
    *,
    num_pairs: int | None = None,
) -> RankingLossOutput:
    r"""
    `sum over pairs of relu(lower + margin - upper) / num_pairs`: low + margin <= baseline <= high - margin.

    A pair is one command with its baseline, (low, baseline) or (baseline, high); T and P add one hinge each. A row
    whose baseline or command has no tokens gives no pair.

    Args:
        low, baseline, high ([`RowMeans`] of `R` rows): The three versions of the same `R` prompts, over the same
            completions, as [`mean_predictions`] gives them.
        config ([`RankingLossConfig`], *optional*): The margins; the weight is for whoever adds this to another loss.
        num_pairs (`int`, *optional*): What the sum is divided by: the pairs of the whole optimiser step when gradients
            accumulate. Defaults to this call's.

    Returns:
        [`RankingLossOutput`]. Without any pair, `loss` is a 0 that still reaches the policy's parameters.

    Example:

    ```python
    >>> import torch
    >>> means = [RowMeans(torch.tensor([t]), None, torch.tensor([True])) for t in (0.75, 0.8, 1.0)]
    >>> round(ranking_loss(*means, RankingLossConfig(temperature_margin=0.1)).loss.item(), 3)
    0.025

    ```
    """
    config = config or RankingLossConfig()
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, or None for the pairs given. Got {num_pairs}.")
    margins = {"temperature": config.temperature_margin, "top_p": config.top_p_margin}
    sums: list[torch.Tensor] = []
    n_pairs = 0
    for lower, upper in ((low, baseline), (baseline, high)):
        both = lower.present & upper.present
        n_pairs += int(both.sum())
        for name, margin in margins.items():
            below, above = vars(lower)[name], vars(upper)[name]
            if below is not None and above is not None:
                sums.append(torch.relu(below + margin - above).masked_fill(~both, 0.0).sum())
    if not sums:
        raise ValueError("the policy predicts neither a temperature nor a top-p, so there is nothing to rank.")
    total = torch.stack(sums).sum()
    return RankingLossOutput(total / (num_pairs or max(n_pairs, 1)), n_pairs, total.detach())
