"""Short names for models, policies and problems that change whenever the thing does; knows nothing of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..hub.bases import fingerprint
from ..policies import DecodingPolicy

# What of a generation config changes nothing here: who wrote it, and what decoders bring themselves.
_NO_CONSTRAINT = {"transformers_version", "_from_model_config", "do_sample", "temperature", "top_k", "top_p", "min_p"}
_PLAIN = (str, int, float, bool, tuple)
_VALUES_A_WEIGHT = 16  # how many numbers of each of a model's weights go into its digest


def rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of whole rows, since with other solutions the rewards would be others."""
    return hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode()).hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """
    The architecture, the constraints of its `generation_config` and a few numbers of every weight: another checkpoint
    of it has another digest, at no cost.
    """
    own = {name: value for name, value in model.generation_config.to_dict().items() if name not in _NO_CONSTRAINT}
    digest = hashlib.sha256(f"{fingerprint(model)} {json.dumps(own, sort_keys=True, default=str)}".encode())
    adapter = {
        id(weight) for module in model.modules() if isinstance(module, DecodingPolicy) for weight in _all(module)
    }
    for name, weight in model.named_parameters():
        # An adapter is not the model's; and what is offloaded has no numbers here.
        if id(weight) in adapter:
            continue
        digest.update(name.encode())
        if weight.device.type != "meta":
            step = max(1, weight.numel() // _VALUES_A_WEIGHT)
            digest.update(_bytes(weight.detach().flatten()[::step]))
    return digest.hexdigest()


def policy_digest(policy: DecodingPolicy) -> str:
    """Class, settings, plain attributes and every number of a policy."""
    settings = {name: value for name, value in policy.config.to_dict().items() if not name.startswith("base_model")}
    digest = hashlib.sha256(f"{type(policy).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    for name, module in policy.named_modules():
        # Of two controls made of one adapter, nothing else may differ.
        plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN) and key != "training"}
        digest.update(f"{name} {sorted(plain.items())}".encode())
    for name, tensor in sorted([*policy.named_parameters(), *policy.named_buffers()]):
        digest.update(name.encode())
        digest.update(_bytes(tensor.detach()))
    return digest.hexdigest()


def _all(module: torch.nn.Module) -> list[torch.Tensor]:
    return list(module.parameters())


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.to("cpu", torch.float64).numpy().tobytes())
