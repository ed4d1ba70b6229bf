"""Where an adapter's gain in likelihood comes from: its mean, or its choices token by token; knows models and text,
nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..modeling import AutoDecoForCausalLM
from ..warping import MIN_TEMPERATURE
from .likelihood import read_documents
from .metrics import Interval, bootstrap_interval

PARTS = ("mean_shift", "alignment", "penalty", "remainder")


@dataclass(frozen=True)
class Decomposition:
    """
    log p(y) under the adapter = base + mean_shift + alignment − penalty + remainder, for each of M tokens, in nats.

    With β = 1/T, β̄ its mean over all tokens and L(β) = log softmax(β·l)[y]: the base is L(1), the mean shift
    L(β̄) − L(1), the alignment L'(β̄)·(β − β̄), and the penalty −½·L''(β̄)·(β − β̄)², what varying β costs whatever it
    follows. The remainder is what second order misses.

    Args:
        document (`np.ndarray` of shape `[M]`, `int64`): Which document a token is of.
        inverse_temperature (`np.ndarray` of shape `[M]`, `float64`): The adapter's β.
        base, mean_shift, alignment, penalty, remainder (`np.ndarray` of shape `[M]`, `float64`): The parts.
        documents (`int`): How many documents there were.
    """

    document: np.ndarray
    inverse_temperature: np.ndarray
    base: np.ndarray
    mean_shift: np.ndarray
    alignment: np.ndarray
    penalty: np.ndarray
    remainder: np.ndarray
    documents: int

    @property
    def adapter(self) -> np.ndarray:
        """What the adapter makes of each token: log p(y), `[M]`."""
        return np.asarray(self.base + self.gain)

    @property
    def gain(self) -> np.ndarray:
        """What the adapter adds to the base's log p(y), `[M]`."""
        return np.asarray(self.mean_shift + self.alignment - self.penalty + self.remainder)

    def by_document(self, part: str) -> np.ndarray:
        """Sums over each document's tokens, `[documents]`, of a part, `"gain"`, `"base"` or `"adapter"`."""
        columns = vars(self) | {"gain": self.gain, "adapter": self.adapter}
        return np.bincount(self.document, columns[part], minlength=self.documents)

    def interval(self, part: str, seed: int = 0) -> Interval:
        """Nats per token of a part, or `"gain"`, over all documents together, with its interval over documents."""
        return bootstrap_interval(self.by_document(part) * self.documents / len(self.document), seed)


@torch.no_grad()
def decompose(model: AutoDecoForCausalLM, rows: Sequence[Mapping[str, Any]]) -> Decomposition:
    """
    An adapter's likelihood of text, part by part. The text is read twice: for β̄, and then around it.

    Top-p plays no part: it would give the tokens it drops no probability at all.

    Args:
        model ([`AutoDecoForCausalLM`]): The adaptive model, in evaluation mode.
        rows (sequence of mappings): Documents with `input_ids` and `labels` (−100 where a token does not count).

    Raises:
        `ValueError`: If no token counts, or the adapter is greedy at one: that has no likelihood.
    """
    document, chosen = [], []
    for some in read_documents(model, rows):
        document += [some.document] * len(some.target)
        chosen.append(some.temperature(model.decoding_adapter).double())
    if not chosen:
        raise ValueError("no token of `rows` counts; pass documents with `labels` that are not all -100.")
    temperature = torch.cat(chosen)
    greedy = (~(temperature > MIN_TEMPERATURE)).nonzero()
    if len(greedy):
        raise ValueError(
            f"token {int(greedy[0])} has temperature {float(temperature[greedy[0]])}: greedy, which gives every other "
            "token no probability. Only adapters with temperatures above 0 can be decomposed."
        )
    beta = 1 / temperature
    mean = float(beta.mean())
    parts, start = [], 0
    for some in read_documents(model, rows):
        own = beta[start : start + len(some.target)]
        parts.append(_parts(some.logits, some.target, own, mean))
        start += len(own)
    columns = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in ("base", *PARTS)}
    return Decomposition(np.array(document), beta.cpu().numpy(), **columns, documents=len(rows))


def _parts(logits: torch.Tensor, target: torch.Tensor, beta: torch.Tensor, mean: float) -> dict[str, torch.Tensor]:
    """The parts, each `[C]`, `torch.float64`, of tokens with logits `[C, V]`, targets `[C]` and β `[C]` in float64."""
    # log p does not change when all logits move, and products with β lose less when they are small.
    logits = logits - logits.amax(-1, keepdim=True)
    base, central, own = (_log_p(logits * scale, target) for scale in (1.0, mean, beta[:, None].float()))
    p = (logits * mean).softmax(-1)
    # L' is how far the token lies above the mean logit, L'' minus the logits' variance; 0 · -inf counts as 0.
    scores = torch.where(p > 0, logits, 0.0)
    expected = (p * scores).sum(-1, keepdim=True)
    variance = (p * (scores - expected) ** 2).sum(-1).double()
    slope = (logits.gather(-1, target[:, None]) - expected).squeeze(-1).double()
    away = beta - mean
    shift, alignment, penalty = central - base, slope * away, variance * away**2 / 2
    remainder = own - base - shift - alignment + penalty
    return {"base": base, "mean_shift": shift, "alignment": alignment, "penalty": penalty, "remainder": remainder}


def _log_p(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none").double()
