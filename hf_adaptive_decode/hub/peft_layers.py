"""
The LoRA in a base model, put there by PEFT: found, held against what can be saved, and set to learn; knows no files.

PEFT is only asked once it is loaded: a model can have none of its layers before.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterConfigError

_ADAPTERS = "decoding_adapters."
# What of a LoRA's settings is saved, or says how it began, where it came from or how it runs.
_KNOWN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "inference_mode"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
}
# The others (PiSSA, OLoRA, LoftQ, ...) take what they put into the LoRA out of the base's own weights.
INITIALISATIONS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
_INSTEAD = "merge it into the base (`merge_and_unload()`), or take it out, and wrap what you get"


@dataclass(frozen=True)
class Lora:
    """
    The LoRA that acts in a model.

    Attributes:
        name (`str`): What PEFT calls it.
        config (`peft.LoraConfig`): Its settings.
        layers (`dict`): PEFT's layers that it is in, by the name of the module that each stands for.
    """

    name: str
    config: Any
    layers: dict[str, Any]

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters."""
        return [cast(nn.Parameter, tensor) for _, tensor in self.tensors().values()]

    def tensors(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Its tensors and what the model's `state_dict` calls them, by the names that PEFT gives them in files."""
        found = {}
        for path, layer in self.layers.items():
            for key, tensor in layer.state_dict(keep_vars=True).items():
                kind, _, rest = key.partition(".")
                name, _, what = rest.partition(".")
                if kind in layer.adapter_layer_names and name == self.name:
                    # PEFT's files know DoRA's magnitudes from when they were a plain parameter.
                    tail = f".{what}" if what and kind != "lora_magnitude_vector" else ""
                    found[f"base_model.model.{path}.{kind}{tail}"] = (f"{path}.{key}", tensor)
        return found


def unwrap_peft(model: Any) -> PreTrainedModel:
    """
    The transformers model in a `peft.PeftModel`, with the LoRA's layers in place, as `model.add_adapter` leaves it.

    A model that is none, such as one whose LoRA has been merged, is given back as it is.

    Raises:
        [`AdapterConfigError`]: If what PEFT did to the model is not one LoRA that is switched on and can be saved.
    """
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        for config in model.peft_config.values():
            _refuse_other_types(config)  # a prompt's has no layers that could be seen
        model = model.base_model.model
    if active_lora(model) is not None:
        # So transformers knows of it: for gradient checkpointing, quantised bases and `disable_adapters`.
        model._hf_peft_config_loaded = True
    return cast(PreTrainedModel, model)


def peft_names(model: nn.Module) -> list[str]:
    """What PEFT calls the adapters in a model, whether they are switched on or not."""
    return sorted(vars(model).get("peft_config") or {}) if lora_layers(model) else []


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """PEFT's layers in a module, by name."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, tuners.BaseTunerLayer)}


def active_lora(model: nn.Module) -> Lora | None:
    """
    The LoRA that acts in a model; `None` where PEFT has done nothing to it.

    Raises:
        [`AdapterConfigError`]: As [`unwrap_peft`].
    """
    layers = lora_layers(model)
    configs = vars(model).get("peft_config") or {}
    if not layers:
        return None
    for config in configs.values():
        _refuse_other_types(config)
    names = sorted({name for layer in layers.values() for name in layer.active_adapters if name in layer.r})
    if any(layer.disable_adapters for layer in layers.values()) or not names:
        raise AdapterConfigError(
            "the base's LoRA is switched off, and would be on again wherever this model is loaded; switch it on "
            "(`model.enable_adapters()`) or take it out (`peft_model.unload()`)."
        )
    if len(names) > 1:
        raise AdapterConfigError(
            f"{len(names)} LoRAs act on the base at once ({', '.join(names)}) and an adapter's folder holds one; "
            f"choose one (`model.set_adapter({names[0]!r})`), or {_INSTEAD}."
        )
    layers = {path: layer for path, layer in layers.items() if names[0] in layer.r}
    _refuse_in_heads(layers)
    _refuse_unknown_settings(configs[names[0]])
    return Lora(names[0], configs[names[0]], layers)


def set_lora_training(model: nn.Module, learns: bool) -> None:
    """
    Makes the LoRA in a model learn, in fp32, or stand still.

    Raises:
        [`AdapterConfigError`]: If it is to learn and there is none, or it is merged; or as [`unwrap_peft`].
    """
    lora = active_lora(model)
    if lora is None:
        if learns:
            raise AdapterConfigError(
                "`train_peft` is set and the base has no LoRA; give it one: `get_peft_model(base, LoraConfig(...))`."
            )
        return
    if learns and any(layer.merged for layer in lora.layers.values()):
        raise AdapterConfigError(
            "the LoRA is merged into the base's weights, where it cannot learn; `peft_model.unmerge_adapter()` first."
        )
    for parameter in lora.parameters():
        if learns:
            parameter.data = parameter.data.float()  # steps of a LoRA are too small for bf16
        parameter.requires_grad_(learns)


def freeze_dropout(module: nn.Module) -> None:
    """
    Puts a part of a base that was just set to training back into evaluation mode, but for the LoRA layers that learn.

    So a frozen base runs without dropout and a LoRA with its own. A part whose own weights learn stays as it is. Layers
    whose activations are checkpointed stay in training mode themselves, without which they would not be: one that
    applies dropout without a module for it, as OPT's do, then does so.
    """
    learning = [layer for layer in lora_layers(module).values() if any(p.requires_grad for p in layer.parameters())]
    of_lora = {id(parameter) for layer in learning for parameter in layer.parameters()}
    if any(p.requires_grad and id(p) not in of_lora for p in module.parameters()):
        return
    module.eval()
    for layer in learning:
        layer.train()
        layer.base_layer.eval()
    for part in module.modules() if learning else ():
        part.training = part.training or bool(vars(part).get("gradient_checkpointing"))


def _refuse_other_types(config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise AdapterConfigError(
            f"the base carries a PEFT adapter of type {kind}, and what goes with a decoding adapter is a LoRA; "
            f"{_INSTEAD}."
        )


def _refuse_in_heads(layers: dict[str, Any]) -> None:
    inside = [path for path in layers if path.startswith(_ADAPTERS)]
    if inside:
        raise AdapterConfigError(
            f"the LoRA is in the decoding adapter too ({inside[0]}), which learns without one; leave it out: "
            'LoraConfig(..., exclude_modules=".*decoding_adapters.*").'
        )


def _refuse_unknown_settings(config: Any) -> None:
    if config.init_lora_weights not in INITIALISATIONS_BESIDE_THE_BASE:
        raise AdapterConfigError(
            f"the LoRA was initialised by {config.init_lora_weights!r}, which changed the base's own weights, so it "
            f"means nothing on the base as it is stored; {_INSTEAD}."
        )
    plain = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _KNOWN
        and getattr(config, field.name)
        and getattr(config, field.name) != getattr(plain, field.name)
    }
    if config.bias != "none":
        changed["bias"] = config.bias
    if changed:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(changed.items()))
        raise AdapterConfigError(
            f"the LoRA has settings that cannot be saved with a decoding adapter ({listed}); {_INSTEAD}."
        )
