"""How likely real text is under temperature-scaled distributions; knows models and policies, nothing of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..losses import IGNORE_INDEX
from ..modeling import AutoDecoForCausalLM
from ..projection import FrozenProjection
from ..types import DecodeState

_CHUNK = 256


@dataclass(frozen=True)
class TextLikelihood:
    """
    Teacher-forced negative log-likelihood of documents, in nats.

    Args:
        static (`np.ndarray` of shape `[documents, temperatures]`): Sums over a document at fixed temperatures.
        adapter (`np.ndarray` of shape `[documents]`): Sums under the adapter's own temperature of each token.
        tokens (`np.ndarray` of shape `[documents]`, `int64`): Predicted tokens of each document.
        mean_temperature (`float`): The adapter's mean temperature over all tokens.
    """

    static: np.ndarray
    adapter: np.ndarray
    tokens: np.ndarray
    mean_temperature: float


@torch.no_grad()
def text_likelihood(
    model: AutoDecoForCausalLM, rows: Sequence[Mapping[str, Any]], temperatures: Sequence[float]
) -> TextLikelihood:
    """
    −log softmax(l / T) of each document's tokens, at fixed temperatures and at the adapter's.

    Top-p plays no part: it would give the tokens it drops no probability at all.

    Args:
        model ([`AutoDecoForCausalLM`]): The adaptive model.
        rows (sequence of mappings): Documents with `input_ids` and `labels` (−100 where a token does not count).
        temperatures (sequence of `float`): The fixed temperatures, each above 0.
    """
    projection = FrozenProjection(model)
    policy = model.decoding_adapter
    scales = torch.tensor(list(temperatures), device=model.device)
    static, adapter, tokens = [], [], []
    total_temperature = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        targets = torch.tensor(row["labels"], device=model.device)[1:]
        keep = targets != IGNORE_INDEX
        hidden = projection.hidden_states(input_ids=ids)[0, :-1][keep]
        document = torch.zeros(len(scales) + 1, dtype=torch.float64)
        for part, target in zip(hidden.split(_CHUNK), targets[keep].split(_CHUNK), strict=True):
            logits = projection.logits(part).float()
            chosen = policy(DecodeState(part, logits)).temperature
            chosen = torch.ones(len(target), device=logits.device) if chosen is None else chosen
            per_token = [_nll(logits / scale, target) for scale in scales]
            per_token.append(_nll(logits / chosen[:, None], target))
            document += torch.stack(per_token).double().sum(1).cpu()
            total_temperature += float(chosen.sum())
        static.append(document[:-1].numpy())
        adapter.append(float(document[-1]))
        tokens.append(int(keep.sum()))
    return TextLikelihood(
        np.array(static), np.array(adapter), np.array(tokens), total_temperature / max(sum(tokens), 1)
    )


def _nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")
