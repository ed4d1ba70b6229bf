"""Parts a frozen base over the processes as `accelerate launch` was told to, with DeepSpeed's ZeRO-3 or with FSDP2, and
leaves its adapters whole; knows both, nothing of losses and rollouts.

For the Trainer what is left is plain data parallelism: only adapters learn, and every process has all of them. So they
keep their precision, their gradients are averaged as ever, and a checkpoint is the same whoever wrote it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..errors import AdaptiveDecodeError

logger = logging.getLogger(__name__)

_ASKED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


class BaseSharding:
    """
    How a launcher wants the base to lie.

    Args:
        zero (`dict`, *optional*): DeepSpeed's config, of ZeRO-3.
        fsdp ([`~accelerate.utils.FullyShardedDataParallelPlugin`], *optional*): Settings of FSDP2.

    Attributes:
        parts (`bool`): Whether processes hold parts of the base; with neither of the above each holds all of it.
    """

    def __init__(self, zero: dict[str, Any] | None, fsdp: FullyShardedDataParallelPlugin | None) -> None:
        self._zero, self._fsdp = zero, fsdp
        self.parts = zero is not None or fsdp is not None
        self._engine: Any = None  # once it is gone the parts are no longer brought together

    @classmethod
    def asked(cls, args: TrainingArguments) -> BaseSharding | None:
        """
        What the launcher or `args` ask for, if it is anything but plain data parallelism.

        ZeRO-1 and ZeRO-2 part gradients and optimiser states of what learns, and hold the base whole. What learns here
        is an adapter, which is kept whole, so nothing is left to part.

        Raises:
            [`AdaptiveDecodeError`]: If it is FSDP of the first version.
        """
        if args.deepspeed_plugin is not None:
            config = args.deepspeed_plugin.deepspeed_config
            stage = config["zero_optimization"]["stage"]
            if stage == 3:
                return cls(config, None)
            logger.info("ZeRO-%d has nothing to part: the base is frozen, and an adapter is kept whole.", stage)
            return cls(None, None)
        if args.fsdp_plugin_args is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return None
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if plugin.fsdp_version != 2:
            raise AdaptiveDecodeError(
                f"`fsdp_version` is {plugin.fsdp_version}; the base is sharded by FSDP2, so set it to 2, as "
                "examples/accelerate/fsdp2.yaml does."
            )
        return cls(None, plugin)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within it accelerate sees processes, and nothing of sharding."""
        state = PartialState()
        if state.distributed_type == DistributedType.DEEPSPEED:
            kind = "GPU" if state.device.type == "cuda" else state.device.type.upper()
            state.distributed_type = DistributedType(f"MULTI_{kind}")
        with mock.patch.dict(os.environ, dict.fromkeys(_ASKED, "false")):
            yield

    def shard(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        """Parts all of a model but its adapters, in place, if it is to be parted."""
        if not self.parts:
            return
        adapters = model._modules.pop("decoding_adapters")
        try:
            if self._zero is not None:
                self._engine = _shard_by_zero(model, self._zero)
            else:
                _shard_by_fsdp(model, self._fsdp, accelerator.device)
        finally:
            model._modules["decoding_adapters"] = adapters
        adapters.to(accelerator.device)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def _shard_by_fsdp(model: PreTrainedModel, plugin: Any, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    how: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "offload_policy": plugin.cpu_offload or OffloadPolicy(),
        # Of the outermost module too, which FSDP2 by itself leaves whole for a backward pass that comes at once. Here
        # none comes, and it is as large as embeddings are.
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    named = plugin.transformer_cls_names_to_wrap or model._no_split_modules or []
    for module in [module for module in model.modules() if type(module).__name__ in named]:
        fully_shard(module, **how)
    fully_shard(model, **how)


def _shard_by_zero(model: PreTrainedModel, asked: dict[str, Any]) -> Any:
    import deepspeed

    zero = {name: value for name, value in asked["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)  # DeepSpeed gets nothing that learns
    config = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
    }
    return deepspeed.initialize(model=model, config=config)[0]
