"""Reads weights of which every process holds a part, as DeepSpeed's ZeRO-3 and FSDP2 leave them; knows their marks, and
nothing of models or training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_distributed_tensor(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 has parted it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has parted it."""
    return hasattr(parameter, "ds_id")


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold parts of a module's parameters."""
    return any(is_distributed_tensor(p) or is_zero_parameter(p) for p in module.parameters())


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of all of a parameter; where it is sharded, processes have to ask for it together."""
    if is_distributed_tensor(parameter):
        sharded: Any = parameter.detach()
        # An offloaded part is where the processes cannot exchange it.
        found: torch.Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor().clone()
        return found
    if not is_zero_parameter(parameter):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
