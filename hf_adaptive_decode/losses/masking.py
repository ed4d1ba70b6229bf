"""Which positions are easy, and a number in [0, 1) to drop each by; it knows no loss and no generator state."""

from __future__ import annotations

import torch

from ..randomness import GOLDEN, MIX_1, mix, shift_right

# Tokens of a vocabulary row are looked at in strided groups of this many: one vectorised pass finds every group's
# maximum, and only groups that can hold what is searched are opened.
GROUP = 16


def is_easy_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Whether the target is what greedy decoding of the base model would pick: `argmax(l) == y`.

    Args:
        logits (`torch.Tensor` of shape `[C, V]`, any floating dtype): The base model's logits.
        targets (`torch.Tensor` of shape `[C]`, long): Token ids. Of tied maxima the lowest id is the argmax.

    Returns:
        `torch.Tensor` of shape `[C]`, bool.
    """
    target_logit = logits.gather(1, targets.unsqueeze(1))
    grouped = logits.shape[1] // GROUP * GROUP
    rest = logits[:, grouped:]
    maxima = logits[:, :grouped].reshape(logits.shape[0], GROUP, grouped // GROUP).amax(dim=1)  # [C, V // GROUP]
    beaten = (maxima > target_logit).any(dim=1) | (rest > target_logit).any(dim=1)

    # Ties are common in low precision: a lower id with the same logit takes the argmax away from the target.
    ids = torch.arange(logits.shape[1], device=logits.device)
    tied = ((rest == target_logit) & (ids[grouped:] < targets.unsqueeze(1))).any(dim=1)
    row, group = ((maxima == target_logit) & ~beaten.unsqueeze(1)).nonzero(as_tuple=True)
    members = ids[:grouped].view(GROUP, -1)[:, group].t()  # [groups found, GROUP]
    earlier = (logits[row.unsqueeze(1), members] == target_logit[row]) & (members < targets[row].unsqueeze(1))
    tied[row[earlier.any(dim=1)]] = True
    easy: torch.Tensor = ~(beaten | tied | target_logit.isnan().squeeze(1))
    return easy


def stable_mask_uniform(input_ids: torch.Tensor, step_seed: int) -> torch.Tensor:
    r"""
    `u[b, t] = hash(step_seed, t, input_ids[b, :t + 1])`, uniform on [0, 1).

    A position's number depends on the seed, on the position and on the row's tokens up to it, and on nothing else: no
    generator state, no other row, no right padding. So the same positions are dropped whatever the batch size, the
    accumulation steps, the chunking or the number of processes, and a resumed run drops what the first one would have.

    Args:
        input_ids (`torch.Tensor` of shape `[B, T]`, integer): Token ids, unpadded or padded on the right.
        step_seed (`int`): Change it to draw anew, for example with the epoch.

    Returns:
        `torch.Tensor` of shape `[B, T]`, float32, multiples of `2**-24`.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [batch, length]. Got {tuple(input_ids.shape)}.")
    position = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.int64) * GOLDEN
    seed = torch.tensor([step_seed % (1 << 63)], device=input_ids.device, dtype=torch.int64)
    token_hash = mix(input_ids.to(torch.int64) * MIX_1 + position)
    prefix_hash = token_hash.cumsum(dim=1)  # wraps around, as a hash may
    bits = mix(mix(prefix_hash + position) + mix(seed * GOLDEN + 1))
    return shift_right(bits, 40).to(torch.float32) * 2.0**-24
