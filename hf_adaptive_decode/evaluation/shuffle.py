"""A control for what an adapter's choices are worth where it makes them: its own parameters, drawn at random; knows
recorded tokens and policies, no models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..configuration import AutoDecoConfig
from ..features import logit_statistics
from ..policies import DecodingPolicy
from ..policies.action_policy import ActionPolicy
from ..policies.static import action_columns
from ..types import DecodeState, SamplingParameters

if TYPE_CHECKING:
    from .tokens import TokenTable


class ShuffledPolicy(DecodingPolicy):
    """
    Each token takes the parameters, all of them together, of a recorded token drawn at random.

    With `bins` the draw is among those whose base entropy lies in the same quantile bin as the token's own, so that
    what entropy alone explains of the choices stays and everything else goes. It is the state's `uniform` that decides,
    or else torch's default generator. A control: neither in the dict of policies nor saved.

    Args:
        recorded ([`SamplingParameters`] with fields of shape `[M]`): What M tokens were sampled with.
        entropy (`torch.Tensor` of shape `[M]`, `torch.float32`, *optional*): Their entropy in nats, needed for bins.
        bins (`int`, *optional*): Number of bins that hold equally many recorded tokens, up to ties; one by default.
        decides_once (`bool`, defaults to `False`): Whether a sequence keeps its first draw.

    Raises:
        `ValueError`: If nothing was recorded, a number is not finite, or the bins are no positive whole number.
    """

    edges: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self,
        recorded: SamplingParameters,
        entropy: torch.Tensor | None = None,
        bins: int | None = None,
        decides_once: bool = False,
    ) -> None:
        super().__init__(AutoDecoConfig())
        columns = {name: column for name, column in vars(recorded).items() if isinstance(column, torch.Tensor)}
        _check(columns, entropy, bins)
        self._decides_once = decides_once
        self.names = tuple(columns)
        rows = len(next(iter(columns.values())))
        edges = torch.empty(0) if bins is None or entropy is None else _quantiles(entropy, bins)
        bin_of = torch.zeros(rows, dtype=torch.long)
        if entropy is not None and len(edges):
            bin_of = torch.searchsorted(edges, entropy.double())
        order = bin_of.argsort(stable=True)
        counts = bin_of.bincount(minlength=len(edges) + 1)
        for name, column in columns.items():
            self.register_buffer(f"recorded_{name}", column[order], persistent=False)
        for name, values in (("edges", edges), ("starts", counts.cumsum(0) - counts), ("counts", counts)):
            self.register_buffer(name, values, persistent=False)

    @property
    def needs_logits(self) -> bool:
        """Logits are read for the bin of their entropy."""
        return len(self.edges) > 0

    @property
    def decides_once(self) -> bool:
        """As the adapter whose parameters these are."""
        return self._decides_once

    @torch.no_grad()
    def forward(self, state: DecodeState) -> SamplingParameters:
        """The recorded fields, of shape `[N]`."""
        device = self.counts.device
        bin_of = torch.zeros(state.hidden.shape[0], dtype=torch.long, device=device)
        if state.logits is not None and self.needs_logits:
            bin_of = torch.searchsorted(self.edges, logit_statistics(state.logits)[:, 1].to(device).double())
        uniform = state.uniform
        if uniform is None:
            uniform = torch.rand(len(bin_of), dtype=torch.float64, device=device)
        chosen = self.starts[bin_of] + (uniform.to(device) * self.counts[bin_of]).long()
        return SamplingParameters(**{name: self.get_buffer(f"recorded_{name}")[chosen] for name in self.names})


def shuffled(
    policy: DecodingPolicy, table: TokenTable, bins: int | None = None, *, parallel_samples: int | None = None
) -> ShuffledPolicy:
    """
    An adapter's own parameters, permuted over the tokens that it wrote.

    Of a policy that decides once a sequence, the parameters of sequences are permuted instead.

    Args:
        policy ([`DecodingPolicy`]): The adapter that wrote the tokens.
        table ([`TokenTable`]): The tokens.
        bins (`int`, *optional*): How many quantile bins of entropy to permute within; all together by default.
        parallel_samples (`int`, *optional*): B as the policy was told it; with `masked_steps="prior"` and a prior for
            several B it says which action masked tokens took.

    Raises:
        `ValueError`: If the table is empty or lacks what a token was sampled with.
    """
    kept = table.position == 0 if policy.decides_once else np.ones(len(table.position), dtype=bool)
    columns = {name: torch.from_numpy(vars(table)[name][kept].copy()) for name in ("temperature", "top_p")}
    if policy.has_actions:
        action = torch.from_numpy(table.action[kept].copy())
        columns |= _action_fields(policy, action, parallel_samples)
    entropy = torch.from_numpy(table.entropy[kept].copy())
    return ShuffledPolicy(SamplingParameters(**columns), entropy, bins, policy.decides_once).eval()


def _action_fields(policy: DecodingPolicy, action: torch.Tensor, parallel: int | None) -> dict[str, torch.Tensor]:
    """What a table does not hold of the actions taken: `top_k` and `min_p`, `[M]`, as far as any action has them."""
    actions = policy.config.actions or []
    used = [name for name in ("top_k", "min_p") if any(name in one for one in actions)]
    if not used:
        return {}
    masked = action < 0
    # Elsewhere a masked token was greedy, and then neither matters.
    if bool(masked.any()) and isinstance(policy, ActionPolicy) and policy.config.masked_steps == "prior":
        if parallel is None and len(policy.config.action_prior or []) > 1:
            raise ValueError(
                "masked tokens took the likeliest action of a prior that depends on B; pass `parallel_samples=`, the B "
                "that the policy was told."
            )
        samples = None if parallel is None else torch.tensor([parallel], device=policy.get_buffer("log_prior").device)
        action = torch.where(masked, policy.prior(samples, 1).argmax().cpu(), action)
    return {name: column[action.clamp(min=0)] for name, column in action_columns(actions).items() if name in used}


def _quantiles(entropy: torch.Tensor, bins: int) -> torch.Tensor:
    """Upper edges of all bins but the last, `[<= bins - 1]`; no bin is left empty, so ties may make them fewer."""
    values = np.unique(entropy.cpu().numpy().astype(np.float64))
    last = np.unique(np.quantile(entropy.cpu().numpy(), np.arange(1, bins) / bins, method="inverted_cdf"))
    place = np.searchsorted(values, last[last < values[-1]])
    # Half way to the next: another kernel gives the same entropy other last digits, and must not cross an edge by them.
    return torch.from_numpy((values[place] + values[place + 1]) / 2)


def _check(columns: dict[str, torch.Tensor], entropy: torch.Tensor | None, bins: int | None) -> None:
    if bins is not None and (isinstance(bins, bool) or not isinstance(bins, int) or bins < 1):
        raise ValueError(f"`bins` is {bins!r}; it has to be a whole number from 1.")
    if bins is not None and entropy is None:
        raise ValueError(f"`bins` is {bins} and `entropy` is missing; bins are quantiles of the recorded entropy.")
    if not columns or any(len(column) == 0 for column in columns.values()):
        raise ValueError("no parameters were recorded; a shuffle needs those of at least one token.")
    for name, column in (columns if entropy is None else columns | {"entropy": entropy}).items():
        bad = (~torch.isfinite(column)).nonzero()
        if len(bad):
            place = int(bad[0])
            raise ValueError(
                f"token {place} has {float(column[place])} as its `{name}`; every token has to have one. "
                "Completions of `engines.transformers.complete` record what they were sampled with."
            )
