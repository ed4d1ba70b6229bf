"""Reads the hidden state that enters a model's output embedding; knows nothing of policies, logits or sampling."""

from __future__ import annotations

from itertools import chain
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import AdaptiveDecodeError


class NoOutputEmbeddingError(AdaptiveDecodeError, TypeError):
    """The model has no output embedding, so there is no hidden state that predicts the next token."""


def output_embedding(model: nn.Module) -> nn.Module:
    """
    The layer that turns hidden states into logits.

    Raises:
        [`NoOutputEmbeddingError`]: If the model has none (a headless or a classification model).
    """
    layer: nn.Module | None = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if layer is None:
        raise NoOutputEmbeddingError(
            f"{type(model).__name__} has no output embedding (`get_output_embeddings()` gives nothing); a decoding "
            "adapter needs a causal language model, such as one from `AutoModelForCausalLM.from_pretrained`."
        )
    return layer


def output_embedding_shape(model: nn.Module) -> tuple[int, int]:
    """`(vocab_size, hidden_size)` of the output embedding; OPT's projected head, say, is narrower than its layers."""
    layer: Any = output_embedding(model)
    # A quantised layer's weight is packed, but it keeps the attributes of the linear layer it replaced.
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return layer.weight.shape[0], layer.weight.shape[1]


def output_device(model: nn.Module) -> torch.device:
    """Where the output embedding computes, and so where a policy should; of an offloaded one, where it is brought."""
    layer = output_embedding(model)
    device = next(chain(layer.parameters(), layer.buffers())).device
    if device.type != "meta":
        return device
    # accelerate keeps offloaded weights elsewhere and has a hook, or several in one, that fetch them for each pass.
    outer: Any = vars(layer).get("_hf_hook")
    hooks = getattr(outer, "hooks", [outer])
    found = [where for hook in hooks if (where := getattr(hook, "execution_device", None)) is not None]
    return torch.device(found[0]) if found else device


class HiddenStateTap:
    """
    While it is open, keeps the last input of the output embedding: a forward-pre-hook, never `output_hidden_states`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to read.
        keeps_all (`bool`, defaults to `False`):
            Whether to keep every position's hidden state; the output embedding then still computes the last alone.

    Example:

    ```python
    >>> with HiddenStateTap(model) as tap:
    ...     model(input_ids)
    ...     hidden = tap.last_position()
    ```
    """

    def __init__(self, model: nn.Module, keeps_all: bool = False) -> None:
        self._layer = output_embedding(model)
        self._keeps_all = keeps_all
        self._hidden: torch.Tensor | None = None
        self._passes = 0
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def open(self) -> HiddenStateTap:
        """Sets the hook."""
        self._handle = self._layer.register_forward_pre_hook(self._hear)
        return self

    def close(self) -> None:
        """Removes the hook and lets the hidden state go."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._hidden = None

    def __enter__(self) -> HiddenStateTap:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._hidden = args[0]
        self._passes += 1
        return (args[0][:, -1:], *args[1:]) if self._keeps_all else None

    def count_passes(self) -> int:
        """Forward passes heard since this was last asked."""
        passes, self._passes = self._passes, 0
        return passes

    def every_position(self) -> torch.Tensor:
        """The hidden states `[rows, length, H]` of the latest forward pass, of a tap that keeps them all."""
        return cast(torch.Tensor, self._hidden)

    def last_position(self) -> torch.Tensor:
        """
        The hidden state `[rows, H]` that predicts each row's next token, from the latest forward pass.

        Raises:
            [`AdaptiveDecodeError`]: If no forward pass has been seen since the tap was opened.
        """
        if self._hidden is None:
            raise AdaptiveDecodeError(
                "no hidden state has reached the output embedding yet: the tap has to be open, on the very model that "
                "generates, before its forward pass."
            )
        return self._hidden[:, -1, :] if self._hidden.dim() == 3 else self._hidden


def mean_over_prompt(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Mean of each prompt's hidden states, `[rows, H]`, `torch.float32`.

    Args:
        hidden (`torch.Tensor` of shape `[rows, length, H]`): Of a prefill.
        mask (`torch.Tensor` of shape `[rows, length]` or longer, *optional*): 0 on padding, which does not count; of a
            longer one, as when the prefill continues a cache, the end.
    """
    if mask is None:
        return hidden.float().mean(1)
    kept = mask[:, -hidden.shape[1] :, None].to(hidden.device)
    return (hidden.float() * kept).sum(1) / kept.sum(1)
