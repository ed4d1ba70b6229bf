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

_VALUES_A_WEIGHT = 16  # how many numbers of each of a model's weights go into its digest


def rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of whole rows, since with other solutions the rewards would be others."""
    return hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True, default=str).encode()).hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """The architecture and a few numbers of every weight: another checkpoint of it has another digest, at no cost."""
    digest = hashlib.sha256(fingerprint(model).encode())
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
    """Class, settings and every number of a policy."""
    settings = {name: value for name, value in policy.config.to_dict().items() if not name.startswith("base_model")}
    digest = hashlib.sha256(f"{type(policy).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted([*policy.named_parameters(), *policy.named_buffers()]):
        digest.update(name.encode())
        digest.update(_bytes(tensor.detach()))
    return digest.hexdigest()


def _all(module: torch.nn.Module) -> list[torch.Tensor]:
    return list(module.parameters())


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.to("cpu", torch.float64).numpy().tobytes())
