"""The decoding loss without ever holding [positions, vocabulary]; it knows no model and no policy, only functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import IGNORE_INDEX, DecodingLossConfig
from .kinds import LOSS_TYPES, PositionLoss, loss_type_of
from .masking import is_easy_token
from .rows import RowDerivatives, soft_top_p_nll

Project = Callable[[torch.Tensor], torch.Tensor]
Predict = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor | None, torch.Tensor | None]]
Observe = Callable[[torch.Tensor, torch.Tensor], None]

# float32 bytes of one chunk's logits: some 200 positions, from where on the projection no longer gets faster.
CHUNK_BYTES = 128 * 2**20

# Rows of the first chunk when the vocabulary's size is still unknown.
_FIRST_CHUNK = 16


@dataclass(frozen=True)
class DecodingLossOutput:
    """The loss and what a trainer logs. Sums are float64 `[]` without graph, so that processes can add them up."""

    # sum_i w_i L_i / num_items, float32 [], with the graph of the policy's predictions
    loss: torch.Tensor
    # positions with a target
    n_valid: int
    # positions that carry a loss: the valid ones less the easy ones dropped altogether
    n_kept: int
    # easy positions that were drawn, whether they lost everything or the temperature's part
    n_easy_dropped: int
    # over the n_kept positions: T, T**2, P, P**2; 0 for a parameter that is not predicted
    temperature_sum: torch.Tensor
    temperature_square_sum: torch.Tensor
    top_p_sum: torch.Tensor
    top_p_square_sum: torch.Tensor
    # over the n_kept positions, unweighted: -log softmax(l / T)_y, and -log p~_y of eq. 3
    temperature_loss_sum: torch.Tensor
    top_p_loss_sum: torch.Tensor


class _KnownDerivatives(torch.autograd.Function):
    """Gives values that were computed without autograd the derivatives that were computed along with them."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        _temperature: torch.Tensor | None,
        _top_p: torch.Tensor | None,
        d_temperature: torch.Tensor,
        d_top_p: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(d_temperature, d_top_p)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_temperature, d_top_p = ctx.saved_tensors
        return (
            None,
            grad * d_temperature if ctx.needs_input_grad[1] else None,
            grad * d_top_p if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


@dataclass(frozen=True)
class Chunk:
    """What is known of a chunk's kept positions, each field `[C]` or without a size, before any gradient is taken."""

    # the rows of the projection that were kept, [C, V]; `None` where the loss does not move them
    logits: torch.Tensor | None
    # as predicted, with the policy's graph
    temperature: torch.Tensor | None
    top_p: torch.Tensor | None
    rows: RowDerivatives
    # L_i and its derivatives
    part: PositionLoss
    # w_i
    weight: torch.Tensor
    n_easy_dropped: int


class LossSums:
    """Adds up over chunks what [`DecodingLossOutput`] reports."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.metrics = torch.zeros(6, device=device, dtype=torch.float64)
        self.n_kept = 0
        self.n_easy_dropped = 0

    def add(self, losses: torch.Tensor, chunk: Chunk) -> None:
        """Counts a chunk and its `w_i L_i` `[C]`."""
        self.loss = self.loss + losses.sum()
        self.n_kept += losses.numel()
        self.n_easy_dropped += chunk.n_easy_dropped
        for index, predicted in enumerate((chunk.temperature, chunk.top_p)):
            if predicted is not None:
                wide = predicted.detach().double()
                self.metrics[2 * index] += wide.sum()
                self.metrics[2 * index + 1] += wide.square().sum()
        self.metrics[4] -= chunk.rows.scaled_log_prob.double().sum()
        self.metrics[5] += chunk.rows.loss.double().sum()

    def output(self, loss: torch.Tensor, n_valid: int) -> DecodingLossOutput:
        """The loss with all that was counted beside it."""
        return DecodingLossOutput(loss, n_valid, self.n_kept, self.n_easy_dropped, *self.metrics.unbind(0))


def chunked_decoding_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    predict: Predict,
    project: Project,
    config: DecodingLossConfig | None = None,
    *,
    mask_uniform: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    chunk_size: int | None = None,
    observe: Observe | None = None,
) -> DecodingLossOutput:
    r"""
    `sum_i w_i L_i / num_items` over the positions with a target, one chunk of positions in memory at a time.

    `L_i` is the loss named by `config.loss_type`, `w_i` the Dynamic Fine-Tuning weight, 0 for a dropped easy position.
    The gradient of each `L_i` with respect to T and P is computed in closed form along with its value, so the graph
    holds the policy's own activations and two numbers a position, and `backward` touches no logits.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`): The frozen model's last hidden states.
        targets (`torch.Tensor` of shape `[N]`, long): Each position's next token; -100 is dropped before projecting.
        predict (`Callable`):
            `predict(hidden [C, H], logits [C, V]) -> (temperature [C] or None, top_p [C] or None)`: the policy, called
            with gradients enabled and with detached inputs. A `None` parameter is left alone: T = 1, or no top-p.
        project (`Callable`): `project(hidden [C, H]) -> logits [C, V]`: the frozen output layer, called under no_grad.
        config (`DecodingLossConfig`, *optional*): Options; the defaults are the paper's.
        mask_uniform (`torch.Tensor` of shape `[N]`, *optional*):
            Numbers in [0, 1); an easy position is dropped where its number is below `easy_token_mask_ratio`. See
            [`stable_mask_uniform`]. Needed unless that ratio is 0.
        num_items (`int` or `torch.Tensor`, *optional*):
            What the sum is divided by: the valid targets of the whole optimiser step when gradients accumulate.
            Defaults to this call's valid targets.
        chunk_size (`int`, *optional*): Positions per chunk; by default as many as fit `CHUNK_BYTES` of float32 logits.
        observe (`Callable`, *optional*):
            `observe(logits [C, V], targets [C])`, called with every chunk in turn, dropped positions included.

    Returns:
        [`DecodingLossOutput`]. Without any position to learn from, `loss` is a 0 that still reaches the policy's
        parameters, so that `backward` gives zeros.
    """
    config = config or DecodingLossConfig()
    check_inputs(hidden, targets, mask_uniform, num_items, chunk_size, config)
    valid = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    sums = LossSums(hidden.device)
    for positions, part, logits in projected_chunks(hidden, valid, project, chunk_size):
        chunk = read_chunk(part, logits, targets[positions], positions, predict, mask_uniform, config)
        if observe is not None:
            observe(logits, targets[positions])
        sums.add(with_derivatives(chunk), chunk)
    divisor = max(valid.numel(), 1) if num_items is None else num_items
    return sums.output(sums.loss / divisor, valid.numel())


def with_derivatives(chunk: Chunk) -> torch.Tensor:
    """`w_i L_i` `[C]`, which moves with the policy's predictions."""
    losses: torch.Tensor = _KnownDerivatives.apply(  # type: ignore[no-untyped-call]
        chunk.weight * chunk.part.value,
        chunk.temperature,
        chunk.top_p,
        chunk.weight * chunk.part.d_temperature,
        chunk.weight * chunk.part.d_top_p,
    )
    return losses


def check_inputs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask_uniform: torch.Tensor | None,
    num_items: int | torch.Tensor | None,
    chunk_size: int | None,
    config: DecodingLossConfig,
) -> None:
    """Raises `ValueError` where shapes or options do not go together."""
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [N, H] and targets [N]. Got {tuple(hidden.shape)} and {tuple(targets.shape)}; flatten "
            "batch and length, and shift the labels by one first."
        )
    if config.easy_token_mask_ratio > 0 and mask_uniform is None:
        raise ValueError(
            f"easy_token_mask_ratio is {config.easy_token_mask_ratio}, so mask_uniform [N] must say which positions to "
            "drop: pass `stable_mask_uniform(input_ids, seed)`, or set the ratio to 0."
        )
    if mask_uniform is not None and mask_uniform.shape != targets.shape:
        raise ValueError(f"mask_uniform must be {tuple(targets.shape)}, like targets. Got {tuple(mask_uniform.shape)}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it by memory. Got {chunk_size}.")
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items must be at least 1. Got {num_items}.")


def projected_chunks(
    hidden: torch.Tensor,
    valid: torch.Tensor,
    project: Project,
    chunk_size: int | None,
    with_graph: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    The valid positions, a chunk at a time: positions `[C]`, their hidden states `[C, H]` and their logits `[C, V]`.

    `with_graph` makes the hidden states the leaves of a graph that holds the projection.
    """
    start, size = 0, chunk_size or _FIRST_CHUNK
    # Even without a valid position one empty chunk comes: it is what connects the 0 to the policy's parameters.
    while start < valid.numel() or start == 0:
        positions = valid[start : start + size]
        part = hidden[positions].detach().requires_grad_(with_graph)
        with torch.set_grad_enabled(with_graph):
            logits = project(part)
        if logits.dim() != 2 or logits.shape[0] != positions.numel():
            raise ValueError(f"project must return [{positions.numel()}, V]. Got {tuple(logits.shape)}.")
        yield positions, part, logits
        start += size
        if chunk_size is None:
            size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))


def read_chunk(
    part: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    predict: Predict,
    mask_uniform: torch.Tensor | None,
    config: DecodingLossConfig,
    moves_logits: bool = False,
) -> Chunk:
    """One chunk: drops easy positions, asks the policy, and takes the losses with their derivatives."""
    _check_vocabulary(target, positions, logits.shape[1])
    drawn = torch.zeros_like(target, dtype=torch.bool)
    n_easy_dropped = 0
    if config.easy_token_mask_ratio > 0 and mask_uniform is not None:
        drawn = _drawn_easy(logits.detach(), target, mask_uniform[positions] < config.easy_token_mask_ratio)
        n_easy_dropped = int(drawn.sum())
    if n_easy_dropped and config.easy_token_mask_target == "both":  # noqa: S105
        # Before anything else looks at these rows: a dropped position costs its projection and nothing more.
        kept = ~drawn
        logits, target, positions, drawn, part = logits[kept], target[kept], positions[kept], drawn[kept], part[kept]

    temperature, top_p = predict(part, logits.detach())
    check_predictions(temperature, top_p, target)
    loss_type = loss_type_of(temperature, top_p, config)
    # What of the loss is the plain cross entropy of softmax(l / T), whose derivative the logits need besides.
    plain_share = (~drawn if loss_type == "two_loss" else torch.zeros_like(drawn)) if moves_logits else None
    rows = soft_top_p_nll(
        logits.detach(),
        None if temperature is None else temperature.detach(),
        None if top_p is None else top_p.detach(),
        target,
        config.alpha,
        base_log_prob=config.dft_weight == "base",
        positions=positions,
        plain_share=plain_share,
    )
    found = weighed(rows, drawn, temperature, top_p, n_easy_dropped, config)
    return replace(found, logits=logits) if moves_logits else found


def weighed(
    rows: RowDerivatives,
    drawn: torch.Tensor,
    temperature: torch.Tensor | None,
    top_p: torch.Tensor | None,
    n_easy_dropped: int,
    config: DecodingLossConfig,
) -> Chunk:
    """What the loss makes of rows; those `drawn` `[C]` do not move the temperature."""
    found = LOSS_TYPES[loss_type_of(temperature, top_p, config)](rows, ~drawn, config)
    weight = torch.ones_like(found.value)
    if config.dft_weight == "base":
        weight = rows.base_log_prob.exp()
    elif config.dft_weight == "scaled":
        weight = rows.scaled_log_prob.exp()
    return Chunk(None, temperature, top_p, rows, found, weight, n_easy_dropped)


def _drawn_easy(logits: torch.Tensor, target: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Which rows are both drawn and easy, `[C]`; only drawn rows whose target is a maximum are looked at closely."""
    # Most rows have a token above the target, which their maximum tells at once; of the rest there may be ties.
    drawn = drawn & (logits.gather(1, target.unsqueeze(1)).squeeze(1) == logits.amax(dim=1))
    # A few rows at a time: the selection is a copy.
    for rows in torch.split(drawn.nonzero().squeeze(1), 16):
        drawn[rows] = is_easy_token(logits[rows], target[rows])
    return drawn


def _check_vocabulary(target: torch.Tensor, positions: torch.Tensor, vocab: int) -> None:
    outside = (target < 0) | (target >= vocab)
    if bool(outside.any()):
        raise ValueError(
            f"The target {target[outside][0].item()} at position {positions[outside][0].item()} is outside the "
            f"vocabulary of {vocab} tokens; use {IGNORE_INDEX} for positions without a target."
        )


def check_predictions(temperature: torch.Tensor | None, top_p: torch.Tensor | None, target: torch.Tensor) -> None:
    """Raises `ValueError` where a prediction is not `[C]`."""
    for name, predicted in (("temperature", temperature), ("top_p", top_p)):
        if predicted is not None and predicted.shape != target.shape:
            raise ValueError(f"predict must return {name} as {tuple(target.shape)}. Got {tuple(predicted.shape)}.")
