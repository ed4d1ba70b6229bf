"""
A base model's LoRA beside its decoding adapter, as PEFT writes one: saved, checked and loaded; knows no policy.

It lies in `peft/`, never at the top of an adapter's folder, which the Auto classes would then take for PEFT's. What is
saved are the layers it is in and the ranks that it has, so that a file holds no pattern to be matched; how the LoRA was
initialised is not part of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import read_settings
from ..configuration_checks import is_int, is_number
from ..errors import AdapterLoadError, MissingExtraError
from .bases import base_name
from .peft_layers import INITIALISATIONS_BESIDE_THE_BASE, Lora, active_lora, lora_layers, peft_names
from .store import PEFT_FILES, PEFT_FOLDER, read_tensors
from .writing import save_tensors

_CONFIG_FILE, _WEIGHTS_FILE = PEFT_FILES
_MAX_RANK = 4096
_MAX_NAMES = 100_000
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,63}")
# In PEFT's files, and of no effect on the LoRA that is in them.
_NOT_READ = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size", "fan_in_fan_out", "layers_pattern", "bias"),
}


def save_peft(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """
    Writes the LoRA that acts in a model to `peft/` in an adapter's folder; takes an older one away where it has none.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, or the adaptive model.
        folder (`str` or `os.PathLike`): The adapter's; made if it is not there.

    Raises:
        [`AdapterConfigError`]: If its LoRA is none that can be saved.
        [`AdapterLoadError`]: If it holds NaN or infinite values.
    """
    lora, target = active_lora(model), Path(folder, PEFT_FOLDER)
    if lora is None:
        _remove(target)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, (_, tensor) in lora.tensors().items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterLoadError(f"{name} holds NaN or infinite values; the LoRA is not worth saving.")
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        staged = Path(staging, PEFT_FOLDER)
        staged.mkdir()
        save_tensors(tensors, staged / _WEIGHTS_FILE)
        settings = json.dumps(_settings(model, lora), indent=2, sort_keys=True)
        Path(staged, _CONFIG_FILE).write_text(f"{settings}\n", encoding="utf-8")
        if not target.exists():
            os.rename(staged, target)
            return
        for name in (_WEIGHTS_FILE, _CONFIG_FILE):
            os.replace(staged / name, target / name)


def load_peft(base: PreTrainedModel, folder: str | os.PathLike[str], is_trainable: bool = False) -> None:
    """
    Puts the LoRA of a folder into a base model; without PEFT's own loading, which would trust the files.

    Args:
        base ([`~transformers.PreTrainedModel`]): Changed in place; left as it was if the LoRA is refused.
        folder (`str` or `os.PathLike`): The `peft/` of an adapter's folder, whose size somebody has bounded.
        is_trainable (`bool`, defaults to `False`): Whether its parameters require gradients; the base's do as before.

    Raises:
        [`AdapterLoadError`]: If the files are damaged or unsafe, do not fit the base, or it has a LoRA already.
        [`MissingExtraError`]: If PEFT is not installed.
    """
    peft = _peft()
    if peft_names(base):
        raise AdapterLoadError(
            f"{os.fspath(folder)} brings a LoRA of its own and the base has one already; pass the plain base model."
        )
    settings = _read(Path(folder, _CONFIG_FILE))
    tensors = read_tensors(Path(folder, _WEIGHTS_FILE))
    learns = [parameter for parameter in base.parameters() if parameter.requires_grad]
    config = peft.LoraConfig(task_type="CAUSAL_LM", inference_mode=True, init_lora_weights=False, **settings)
    try:
        # Without memory for weights that are replaced in a moment; an embedding's draw random numbers all the same.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT sets it as the layer needs
            peft.inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
        lora = active_lora(base)
        if lora is None:
            raise ValueError("the base has none of its layers")
        _fill(base, lora, tensors, Path(folder, _WEIGHTS_FILE))
    except (ValueError, TypeError, RuntimeError) as error:
        _take_out(base)
        if isinstance(error, AdapterLoadError):
            raise
        raise AdapterLoadError(
            f"the LoRA in {os.fspath(folder)} does not fit {type(base).__name__}: {error}"
        ) from error
    finally:
        for parameter in learns:  # PEFT froze them
            parameter.requires_grad_(True)
    for layer in lora.layers.values():
        layer.train(layer.base_layer.training)
    for parameter in lora.parameters():
        parameter.requires_grad_(is_trainable)
    base._hf_peft_config_loaded = True


def check_lora(model: nn.Module, folder: Path | None, source: str) -> None:
    """
    Warns if an adapter came with a LoRA and the model that it is to decode with has none, or another one.

    Args:
        model ([`~transformers.PreTrainedModel`]): Only looked at.
        folder (`Path`, *optional*): The `peft/` of the adapter's folder; `None` without one.
        source (`str`): What the warning calls the adapter.
    """
    if folder is None:
        return
    lora = active_lora(model)
    if lora is None:
        warnings.warn(
            f"the adapter {source!r} was trained on its base with the LoRA in {folder}, and {type(model).__name__} has "
            "none; unless that is merged into the weights, the decisions mean nothing. Put it in first: "
            f"`peft.PeftModel.from_pretrained(base, {str(folder)!r})`.",
            stacklevel=3,
        )
        return
    own, tensors = lora.tensors(), read_tensors(folder / _WEIGHTS_FILE)
    alike = set(own) == set(tensors) and all(_equal(tensors[name], tensor) for name, (_, tensor) in own.items())
    if not alike:
        warnings.warn(
            f"the adapter {source!r} was trained on its base with the LoRA in {folder}, and that of this "
            f"{type(model).__name__} is another one, so its hidden states may mean something else.",
            stacklevel=3,
        )


def _equal(stored: torch.Tensor, own: torch.Tensor) -> bool:
    return stored.shape == own.shape and torch.equal(stored.to(own.device, own.dtype), own.detach())


def restore_peft(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """
    Fills the LoRA that a model has with that of a checkpoint, whose folder has none if and only if the model has none.

    Raises:
        [`AdapterLoadError`]: If one of them has a LoRA and the other has none, or another one.
    """
    lora, weights = active_lora(model), Path(folder, PEFT_FOLDER, _WEIGHTS_FILE)
    if (lora is None) == weights.exists():
        has, lacks = ("the checkpoint", "the model") if lora is None else ("the model", "the checkpoint")
        raise AdapterLoadError(f"{has} has a LoRA and {lacks} has none: {os.fspath(folder)} is of another run.")
    if lora is not None:
        _fill(model, lora, read_tensors(weights), weights)


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    return peft


def _remove(target: Path) -> None:
    """Takes away what an earlier save wrote; what somebody else put there stays."""
    for name in PEFT_FILES:
        Path(target, name).unlink(missing_ok=True)
    if target.is_dir() and not any(target.iterdir()):
        shutil.rmtree(target)


def _settings(model: PreTrainedModel, lora: Lora) -> dict[str, Any]:
    """The LoRA as it is, layer by layer: what most layers have, and the others by name."""
    ranks = {path: layer.r[lora.name] for path, layer in lora.layers.items()}
    alphas = {path: layer.lora_alpha[lora.name] for path, layer in lora.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": _targets(model, lora),
        "lora_dropout": lora.config.lora_dropout,
        "use_rslora": lora.config.use_rslora,
        "use_dora": lora.config.use_dora,
        "lora_bias": lora.config.lora_bias,
    }


def _targets(model: nn.Module, lora: Lora) -> list[str]:
    """The last words of the layers' names where those name no other module, or else the whole names."""
    inside = tuple(f"{path}." for path in lora_layers(model))
    names = [name for name, _ in model.named_modules() if not name.startswith((*inside, "decoding_adapters."))]
    last = {path.rpartition(".")[2] for path in lora.layers}
    alike = {name for name in names if name.rpartition(".")[2] in last}
    return sorted(last if alike == set(lora.layers) else lora.layers)


def _read(path: Path) -> dict[str, Any]:
    """The settings of a LoRA that PEFT needs, each of its type and within bounds."""
    values = read_settings(path)
    for name, allowed, why in _FIXED:
        if values.get(name) not in (None, *allowed):
            raise AdapterLoadError(f"{path}: `{name}` is {_shown(values[name])}; {why}.")
    others = sorted(name for name, value in values.items() if name not in {*_FIELDS, *_NOT_READ} and value)
    if others:
        raise AdapterLoadError(f"{path} has settings that are not known here: {_shown(', '.join(others))}.")
    found = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    for name, value in found.items():
        wanted, holds = _FIELDS[name]
        if not holds(value):
            raise AdapterLoadError(f"{path}: `{name}` is {_shown(value)}; it has to be {wanted}.")
    for name in ("peft_type", "target_modules"):
        if not values.get(name):
            raise AdapterLoadError(f"{path} has no `{name}`; save the adapter again.")
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _are_names(value: Any) -> bool:
    return isinstance(value, list | dict) and len(value) <= _MAX_NAMES and all(map(_is_name, value))


def _is_name(value: Any) -> bool:
    # No other sign, since PEFT makes regular expressions of some of them.
    return isinstance(value, str) and len(value) <= 512 and _NAME.fullmatch(value) is not None


def _is_rank(value: Any) -> bool:
    return is_int(value, 1, _MAX_RANK)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _maps(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and _are_names(value) and all(map(holds, value.values()))


_FIXED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("peft_type", ("LORA",), "what goes with a decoding adapter is a 'LORA'"),
    ("bias", ("none",), "it has to be 'none', as the base's weights stay its own"),
    (
        "init_lora_weights",
        INITIALISATIONS_BESIDE_THE_BASE,
        "that changes the base's own weights; convert the LoRA to a plain one with PEFT first",
    ),
)
_RANK, _ALPHA, _FLAG = f"a whole number from 1 to {_MAX_RANK}", "a finite number", "true or false"
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (_RANK, _is_rank),
    "lora_alpha": (_ALPHA, is_number),
    "rank_pattern": (f"modules' names, each with {_RANK}", _maps(_is_rank)),
    "alpha_pattern": (f"modules' names, each with {_ALPHA}", _maps(is_number)),
    "target_modules": ("a list of modules' names", lambda value: isinstance(value, list) and _are_names(value)),
    "lora_dropout": ("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    "use_rslora": (_FLAG, _is_flag),
    "use_dora": (_FLAG, _is_flag),
    "lora_bias": (_FLAG, _is_flag),
}


def _fill(model: PreTrainedModel, lora: Lora, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Gives a LoRA the tensors of a file; every one of them, and no other."""
    wanted = lora.tensors()
    problems = [f"{name} is missing" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"{name} is unexpected" for name in sorted(set(tensors) - set(wanted))]
    for name in sorted(set(wanted) & set(tensors)):
        found, shape = tuple(tensors[name].shape), tuple(wanted[name][1].shape)
        if found != shape:
            problems.append(f"{name} has shape {found} and should have {shape}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise AdapterLoadError(
            f"{path} does not hold the LoRA that its config describes on this base: {'; '.join(problems[:20])}{more}."
        )
    is_empty = any(tensor.is_meta for _, tensor in wanted.values())
    # Copies, since in a file tensors lie where kernels may round otherwise than on aligned memory.
    state = {key: tensors[name].clone() for name, (key, _) in wanted.items()}
    model.load_state_dict(state, strict=False, assign=is_empty)
    for layer in lora.layers.values() if is_empty else ():
        device = layer.get_base_layer().weight.device
        for kind in layer.adapter_layer_names if device.type != "meta" else ():
            getattr(layer, kind).to(device)


def _take_out(base: PreTrainedModel) -> None:
    """Undoes an injection."""
    for path, layer in lora_layers(base).items():
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    vars(base).pop("peft_config", None)
