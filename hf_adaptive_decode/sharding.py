"""Reads weights of which every process holds a part, as DeepSpeed's ZeRO-3 and FSDP2 leave them; knows their marks, and
nothing of models or training.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has parted it."""
    return hasattr(parameter, "ds_id")


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold parts of a module's parameters."""
    return any(isinstance(p, DTensor) or is_zero_parameter(p) for p in module.parameters())


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of all of a parameter; where it is sharded, processes have to ask for it together."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().clone()
    if not is_zero_parameter(parameter):
        return parameter.detach().clone()
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()
