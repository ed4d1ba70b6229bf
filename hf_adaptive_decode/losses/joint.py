"""
The decoding loss whose gradient also reaches the model below, still without ever holding [positions, vocabulary].

It knows no model and no policy, only functions and the tensors that learn. A chunk's gradient is taken as soon as its
value is known, with respect to its hidden states and to everything that learns above them, so what remains for the one
`backward` through the model is a matrix as large as the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .chunked import Chunk, DecodingLossOutput, LossSums, Predict, Project, check_inputs, projected_chunks, read_chunk
from .config import IGNORE_INDEX, DecodingLossConfig


class _KnownGradients(torch.autograd.Function):
    """Gives a value the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: Sequence[torch.Tensor], *inputs: torch.Tensor) -> Any:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [given.dtype for given in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((grad * gradient).to(dtype) for gradient, dtype in known)


def joint_decoding_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    predict: Predict,
    project: Project,
    parameters: Sequence[torch.Tensor],
    config: DecodingLossConfig | None = None,
    *,
    mask_uniform: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> DecodingLossOutput:
    r"""
    [`chunked_decoding_loss`], with the same value, for a model that learns together with its policy.

    `backward` gives gradients to `hidden`, through the logits and through what the policy reads of it, and to
    `parameters`. Which positions are easy, the Dynamic Fine-Tuning weights and the statistics of the logits that a
    policy may read are held constant, as they are for a frozen model.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`): The model's last hidden states, with its graph.
        targets, predict, config, mask_uniform, num_items, chunk_size: As [`chunked_decoding_loss`] takes them;
            `predict` is called with hidden states that require gradients.
        project (`Callable`): `project(hidden [C, H]) -> logits [C, V]`, differentiable.
        parameters (sequence of `torch.Tensor`): What learns of the policy and of the output layer, each a leaf.

    Returns:
        [`DecodingLossOutput`].
    """
    config = config or DecodingLossConfig()
    check_inputs(hidden, targets, mask_uniform, num_items, chunk_size, config)
    valid = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    sums = LossSums(hidden.device)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    of_hidden = torch.zeros_like(hidden, dtype=wide)
    of_parameters = [torch.zeros_like(p) for p in parameters]
    for positions, part, logits in projected_chunks(hidden, valid, project, chunk_size, with_graph=True):
        chunk = read_chunk(part, logits, targets[positions], positions, predict, mask_uniform, config, True)
        of_part, *found = _gradients(chunk, [part, *parameters])
        if of_part is not None:
            of_hidden[positions] = of_part.to(wide)
        for total, gradient in zip(of_parameters, found, strict=True):
            if gradient is not None:
                total += gradient
        sums.add(chunk.weight * chunk.part.value, chunk)
        del chunk, logits  # before the next ones are made
    value: torch.Tensor = _KnownGradients.apply(sums.loss, [of_hidden, *of_parameters], hidden, *parameters)  # type: ignore[no-untyped-call]
    divisor = max(valid.numel(), 1) if num_items is None else num_items
    return sums.output(value / divisor, valid.numel())


def _gradients(chunk: Chunk, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `sum(w_i L_i)`; `None` for what it does not depend on."""
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    if chunk.logits is not None and chunk.rows.d_logits is not None:
        ends.append((chunk.logits, chunk.rows.d_logits.mul_(chunk.weight.unsqueeze(1))))
    for predicted, derivative in ((chunk.temperature, chunk.part.d_temperature), (chunk.top_p, chunk.part.d_top_p)):
        if predicted is not None and predicted.requires_grad:
            ends.append((predicted, chunk.weight * derivative))
    outputs = [end for end, _ in ends]
    given = [gradient.to(end.dtype) for end, gradient in ends]
    return torch.autograd.grad(outputs, inputs, given, allow_unused=True)
