"""A model in two halves, so that no batch's logits exist at once; knows output layers, no losses or policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .errors import AdaptiveDecodeError
from .sharding import is_sharded, whole
from .tap import output_embedding

Transform = Callable[[torch.Tensor], torch.Tensor]


class Projection:
    """
    Runs a causal model up to the input of its output embedding, and its output embedding on chosen positions.

    Some models change the logits behind that layer (Gemma 2 caps them, Cohere and Granite scale them). What is done is
    read from the config and then checked against the model's own logits on the first batch.

    Of a model whose layers are sharded over processes a copy of the output embedding is kept whole: how many positions
    are asked for is each process's own affair.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.

    Raises:
        [`AdaptiveDecodeError`]: If the output embedding is sharded and no plain linear layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layer = output_embedding(model)
        self._project = _whole_linear(self._layer) if is_sharded(self._layer) else self._layer
        self._transform: Transform | None = None

    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """
        One forward pass.

        Args:
            inputs: `input_ids` `[B, L]` and whatever else the model takes.

        Returns:
            `torch.Tensor` of shape `[B, L, H]`: what enters the output embedding.

        Raises:
            [`AdaptiveDecodeError`]: If the model's logits are not its output embedding's, up to a known transform.
        """
        seen: list[torch.Tensor] = []

        def keep_all_but_compute_one(layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, -1:], *args[1:])

        def keep_raw(layer: torch.nn.Module, args: tuple[Any, ...], raw: torch.Tensor) -> None:
            seen.append(raw)

        handles = [
            self._layer.register_forward_pre_hook(keep_all_but_compute_one),
            self._layer.register_forward_hook(keep_raw),
        ]
        try:
            logits = self._model(**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        hidden, raw = seen[-2:]
        if self._transform is None:
            self._transform = self._find_transform(raw.detach()[:, -1], logits.detach()[:, -1])
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[C, V]` of hidden states `[C, H]`, as the model itself would give them."""
        raw = self._project(hidden)
        return raw if self._transform is None else self._transform(raw)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the output embedding."""
        return self._layer.parameters()

    def _find_transform(self, raw: torch.Tensor, wanted: torch.Tensor) -> Transform:
        exact = raw.dtype == wanted.dtype == torch.float32
        scale = wanted.float().abs().amax().clamp(min=1.0)
        errors = {t: float((t(raw.float()) - wanted.float()).abs().amax() / scale) for t in _candidates(self._model)}
        best = min(errors, key=lambda transform: errors[transform])
        if errors[best] <= (1e-4 if exact else 2e-2):
            return best
        raise AdaptiveDecodeError(
            f"{type(self._model).__bases__[-1].__name__} changes its logits behind the output embedding in a way this "
            "library does not know (known: a softcap, `logit_scale`, `logits_scaling`, `lm_head_multiplier`), so the "
            "logits could not be computed from hidden states."
        )


class FrozenProjection(Projection):
    """A [`Projection`] that never builds a graph."""

    @torch.no_grad()
    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """As [`Projection.hidden_states`]."""
        return super().hidden_states(**inputs)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As [`Projection.logits`]."""
        return super().logits(hidden)


def _whole_linear(layer: nn.Module) -> Transform:
    if not isinstance(layer, nn.Linear) or not type(layer).forward.__module__.startswith("torch.nn."):
        raise AdaptiveDecodeError(
            f"the output embedding is a {type(layer).__name__} and is sharded over processes, and only a linear layer "
            "can be made whole again; load the base without quantisation, and merge a LoRA of that layer, or leave the "
            "base whole in every process (examples/accelerate/ddp.yaml)."
        )
    parameters = dict(layer.named_parameters(recurse=False))
    weight, bias = whole(parameters["weight"]), whole(parameters["bias"]) if "bias" in parameters else None
    return lambda hidden: F.linear(hidden, weight, bias)


def _candidates(model: PreTrainedModel) -> list[Transform]:
    """What may happen to the logits behind the layer, by the settings that the model's config has."""
    settings = model.config.get_text_config().to_dict()
    found: list[Transform] = [lambda logits: logits]
    cap = settings.get("final_logit_softcapping")
    if cap:
        found.append(lambda logits: torch.tanh(logits / cap) * cap)
    for name in ("logit_scale", "lm_head_multiplier"):
        if settings.get(name):
            found.append(_times(settings[name]))
    if settings.get("logits_scaling"):
        found.append(_times(1 / settings["logits_scaling"]))
    return found


def _times(factor: float) -> Transform:
    return lambda logits: logits * factor
