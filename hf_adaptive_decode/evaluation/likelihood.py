"""How likely real text is under temperature-scaled distributions; knows models and policies, nothing of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..losses import IGNORE_INDEX
from ..modeling import AutoDecoForCausalLM
from ..policies import DecodingPolicy
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


@dataclass(frozen=True)
class Predictions:
    """
    Some of a document's predictions, few enough that their logits fit in memory.

    Args:
        document (`int`): Index of the document.
        hidden (`torch.Tensor` of shape `[C, H]`): Input of the output embedding, in the base's dtype.
        logits (`torch.Tensor` of shape `[C, V]`, `torch.float32`): The base's logits.
        target (`torch.Tensor` of shape `[C]`, `torch.long`): The tokens that came, on the logits' device.
    """

    document: int
    hidden: torch.Tensor
    logits: torch.Tensor
    target: torch.Tensor

    def temperature(self, policy: DecodingPolicy) -> torch.Tensor:
        """What a policy says, `[C]`, `torch.float32`, on the logits' device; 1 where it leaves temperature off."""
        chosen = policy(DecodeState(self.hidden, self.logits)).temperature
        if not isinstance(chosen, torch.Tensor):
            chosen = torch.full(self.target.shape, 1.0 if chosen is None else float(chosen))
        return chosen.to(self.logits.device)


@torch.no_grad()
def read_documents(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Iterator[Predictions]:
    """
    Teacher-forced predictions of the tokens that count, document by document.

    Args:
        model ([`~transformers.PreTrainedModel`]): A base or adaptive model, in evaluation mode.
        rows (sequence of mappings): Documents with `input_ids` and `labels` (−100 where a token does not count).
    """
    projection = FrozenProjection(model)
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]], device=model.device)
        targets = torch.tensor(row["labels"], device=model.device)[1:]
        keep = targets != IGNORE_INDEX
        hidden = projection.hidden_states(input_ids=ids)[0, :-1]
        hidden = hidden[keep.to(hidden.device)]
        for part, target in zip(hidden.split(_CHUNK), targets[keep].split(_CHUNK), strict=True):
            if len(target):
                logits = projection.logits(part).float()
                yield Predictions(number, part, logits, target.to(logits.device))


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
    static = np.zeros((len(rows), len(temperatures)))
    adapter, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    total_temperature = 0.0
    for some in read_documents(model, rows):
        chosen = some.temperature(model.decoding_adapter)
        static[some.document] += [float(_nll(some.logits / scale, some.target)) for scale in temperatures]
        adapter[some.document] += float(_nll(some.logits / chosen[:, None], some.target))
        tokens[some.document] += len(some.target)
        total_temperature += float(chosen.sum())
    return TextLikelihood(static, adapter, tokens, total_temperature / max(int(tokens.sum()), 1))


def _nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum over tokens, added up in double precision."""
    return torch.nn.functional.cross_entropy(logits, target, reduction="none").double().sum()
