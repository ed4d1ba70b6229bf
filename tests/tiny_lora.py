"""LoRAs on the tiny models, strong enough to change every token, and the same base with its weights changed by hand."""

from __future__ import annotations

import peft
import torch
from tiny import build_base

TARGETS = {"gpt2": ["c_attn", "c_proj"], "gpt_oss": ["q_proj", "o_proj"]}
RANK, ALPHA = 3, 6


@torch.no_grad()
def randomise(model, seed: int = 0, size: float = 0.1):
    """Gives every tensor of the LoRA other numbers: a fresh one adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def build_lora(family: str = "qwen3", size: float = 0.1, base=None, **settings):
    """A `peft.PeftModel` over a tiny base, in evaluation mode; every call gives the same weights."""
    targets = TARGETS.get(family, ["q_proj", "down_proj"] if family != "opt" else ["q_proj", "fc2"])
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(base or build_base(family), config)
    return randomise(tuned, size=size).eval()


@torch.no_grad()
def changed_by_hand(tuned, family: str = "qwen3"):
    """A base without any LoRA whose weights are `W + alpha / r · B A`, from the tensors of `tuned`."""
    base = build_base(family)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tuned.state_dict().items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.default.weight"):
            layer = name.removesuffix(".lora_A.default.weight")
            change = ALPHA / RANK * tensors[f"{layer}.lora_B.default.weight"] @ a
            weight = base.get_submodule(layer).weight
            weight.add_(change if weight.shape == change.shape and family != "gpt2" else change.T)
    return base


def lora_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" in name}


def rest_of(model) -> dict[str, torch.Tensor]:
    """What stands still: neither LoRA nor decoding adapter."""
    own = (".lora_", "decoding_adapters.")
    return {name: t.clone() for name, t in model.state_dict().items() if not any(part in name for part in own)}


def heads_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.decoding_adapter.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
