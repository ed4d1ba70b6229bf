"""An adapter's files: found, checked, read and written; knows policies and the base's shape, nothing of sampling."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..configuration import MAX_CONFIG_BYTES, AutoDecoConfig, read_config, read_settings
from ..configuration_checks import is_released_format
from ..errors import AdapterConfigError, AdapterLoadError
from ..policies import DecodingPolicy, build_policy
from ..tap import output_device, output_embedding_shape
from .bases import fingerprint
from .files import Wanted, fetch
from .writing import save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# A LoRA of the base that belongs to the adapter, as PEFT writes it.
PEFT_FOLDER = "peft"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# 64 MiB hold the heads of a 30,000 wide model; more is a mistake or an attack.
MAX_WEIGHT_BYTES = 64 << 20
# 1 GiB holds a LoRA of rank 64 on every linear layer of an 8B model, in fp32.
MAX_PEFT_BYTES = 1 << 30
_MAX_HEADER_BYTES = 1 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class AdapterFiles:
    """
    Where an adapter's files lie.

    Attributes:
        source (`str`): The folder or Hub id as given.
        config, weights (`Path`): Its `config.json` and `model.safetensors`.
        is_remote (`bool`): Whether they came from the Hub.
        commit (`str`, *optional*): The Hub commit that all of them are of; `None` for a folder on this machine.
        peft (`Path`, *optional*): The folder of the LoRA that belongs to it; `None` without one.
    """

    source: str
    config: Path
    weights: Path
    is_remote: bool
    commit: str | None = None
    peft: Path | None = None

    def read_config(self) -> AutoDecoConfig:
        """The adapter's settings, which remember the commit as `_commit_hash`; raises as [`read_config`]."""
        config = read_config(self.config)
        config._commit_hash = self.commit
        return config


def locate(
    adapter: str | os.PathLike[str],
    subfolder: str = "",
    revision: str | None = None,
    max_weight_bytes: int = MAX_WEIGHT_BYTES,
    max_peft_bytes: int = MAX_PEFT_BYTES,
    **download: Any,
) -> AdapterFiles:
    """
    Finds an adapter's files in a folder, or downloads them from the Hub, all at one commit.

    Args:
        adapter (`str` or `os.PathLike`): Folder or Hub id.
        subfolder (`str`): Folder within it.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        max_weight_bytes, max_peft_bytes (`int`): Larger weights, or a larger LoRA, are refused, before they are
            downloaded.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        [`AdapterLoadError`]: If a file is missing or too large, or the Hub cannot be reached.
    """
    settings, lora = (f"{PEFT_FOLDER}/{name}" for name in PEFT_FILES)
    wanted = (
        # On this machine it is for its reader to refuse.
        Wanted(CONFIG_FILE, sys.maxsize if os.path.isdir(adapter) else MAX_CONFIG_BYTES),
        Wanted(settings, MAX_CONFIG_BYTES, optional=True),
        Wanted(lora, max_peft_bytes, "max_peft_bytes", optional=True),
        # The last, so that a load which was cut short leaves no weights without their LoRA in the cache.
        Wanted(WEIGHTS_FILE, max_weight_bytes, "max_weight_bytes"),
    )
    found = fetch(adapter, wanted, subfolder=subfolder, revision=revision, **download)
    missing = [name for name in (settings, lora) if name not in found.paths]
    if len(missing) == 1:
        raise AdapterLoadError(
            f"{found.source!r} has a folder {PEFT_FOLDER}/ without {missing[0]}; a LoRA is these two files, and no "
            "pickle (.bin) is loaded in their place. Save the adapter again."
        )
    peft = None if missing else found.folder / PEFT_FOLDER
    config, weights = found.paths[CONFIG_FILE], found.paths[WEIGHTS_FILE]
    return AdapterFiles(found.source, config, weights, found.is_remote, found.commit, peft)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, with the checks that the format leaves out: no key twice, no NaN, no inf.

    Raises:
        [`AdapterLoadError`]: Names the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise AdapterLoadError(
                    f"{path}: its header claims {length} bytes; the file is damaged or not safetensors."
                )
            json.loads(file.read(length), object_pairs_hook=lambda pairs: _refuse_twice(path, pairs))
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterLoadError):
            raise
        raise AdapterLoadError(f"{path} is damaged or no safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise AdapterLoadError(f"{path}: {name} has dtype {tensor.dtype}; an adapter's tensors are {allowed}.")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterLoadError(f"{path}: {name} holds NaN or infinite values; the adapter is unusable.")
    return tensors


def _refuse_twice(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise AdapterLoadError(f"{path}: its header names {', '.join(twice)} more than once.")
    return found


def load_adapter(
    adapter: str | os.PathLike[str] | AdapterFiles,
    model: nn.Module,
    config: AutoDecoConfig | None = None,
    **hub_kwargs: Any,
) -> DecodingPolicy:
    """
    An adapter's policy, ready to decode with `model`, on the device of its output embedding.

    Args:
        adapter (`str`, `os.PathLike` or [`AdapterFiles`]): Folder, Hub id, or files already found.
        model ([`~transformers.PreTrainedModel`]): The base model; only looked at.
        config ([`AutoDecoConfig`], *optional*): The adapter's config where it has been read already.
        hub_kwargs: As for [`locate`].

    Raises:
        [`AdapterLoadError`]: If the files are damaged or do not fit each other or the model.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else locate(adapter, **hub_kwargs)
    config = config or files.read_config()
    check_fit(config, model, files.source)
    policy = read_policy(files, config, hub_kwargs.get("max_weight_bytes", MAX_WEIGHT_BYTES))
    return policy.to(output_device(model)).eval()


def read_policy(
    files: AdapterFiles, config: AutoDecoConfig, max_weight_bytes: int = MAX_WEIGHT_BYTES
) -> DecodingPolicy:
    """
    The policy that an adapter's config describes, filled with its weights, on the CPU.

    Raises:
        [`AdapterLoadError`]: If the weights are damaged or do not fit the config, or it describes too large a policy.
    """
    with torch.device("meta"):
        needed = sum(p.numel() * 4 for p in build_policy(config).parameters())
    limit = Wanted(WEIGHTS_FILE, max_weight_bytes, "max_weight_bytes")
    limit.refuse_size(f"the policy that {files.config} describes", needed)
    policy = build_policy(config)
    load_into(policy, files.weights)
    return policy


def load_into(policy: DecodingPolicy, weights: Path) -> None:
    """
    Fills a policy with the tensors of a file; every one of them, and no other.

    Raises:
        [`AdapterLoadError`]: Lists missing, unexpected and mis-shaped tensors.
    """
    tensors = read_tensors(weights)
    wanted = policy.state_dict()
    problems = [f"{name} is missing" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"{name} is unexpected" for name in sorted(set(tensors) - set(wanted))]
    for name in sorted(set(wanted) & set(tensors)):
        found, shape = tuple(tensors[name].shape), tuple(wanted[name].shape)
        if found != shape:
            problems.append(f"{name} has shape {found} and should have {shape}")
    if problems:
        raise AdapterLoadError(f"{weights} does not hold the policy that its config describes: {'; '.join(problems)}.")
    policy.load_state_dict(tensors)


def check_shape(config: AutoDecoConfig, hidden_size: int, vocab_size: int, source: str, base: str) -> None:
    """Raises [`AdapterLoadError`] if an adapter was made for another width or vocabulary than `base` has."""
    for name, found, wanted in (
        ("hidden_size", config.hidden_size, hidden_size),
        ("vocab_size", config.vocab_size, vocab_size),
    ):
        if found != wanted:
            raise AdapterLoadError(
                f"the adapter {source!r} was made for a base with {name} {found}, and {base} has {wanted}; load it on "
                f"its own base ({config.base_model_name_or_path!r}) or train one for this model."
            )


def check_fit(config: AutoDecoConfig, model: nn.Module, source: str) -> None:
    """
    Holds an adapter's config against a base model.

    Raises:
        [`AdapterLoadError`]: If their widths or vocabularies differ. Warns if only the architecture's settings do.
    """
    vocab_size, hidden_size = output_embedding_shape(model)
    check_shape(config, hidden_size, vocab_size, source, type(model).__name__)
    if config.base_fingerprint not in (None, fingerprint(model)):
        warnings.warn(
            f"the adapter {source!r} was trained on {config.base_model_name_or_path!r}; this base has the same shape "
            "but other settings, so its hidden states may mean something else.",
            stacklevel=3,
        )


def refuse_another_model(folder: str | os.PathLike[str]) -> None:
    """Raises [`AdapterLoadError`] if a folder holds a model that is no adapter, whose files would be lost."""
    with contextlib.suppress(AdapterConfigError, FileNotFoundError):  # what cannot be read is nobody's model
        settings = read_settings(Path(folder, CONFIG_FILE))
        if settings.get("model_type") != AutoDecoConfig.model_type or is_released_format(settings):
            raise AdapterLoadError(
                f"{os.fspath(folder)} holds another model (model_type {settings.get('model_type')!r}), which an "
                "adapter saved there would overwrite; name another folder."
            )


def save_adapter(policy: DecodingPolicy, config: AutoDecoConfig, folder: str | os.PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors`; each appears whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    refuse_another_model(folder)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    for name, tensor in tensors.items():
        if not math.isfinite(float(tensor.abs().max())):
            raise AdapterLoadError(f"{name} holds NaN or infinite values; the adapter is not worth saving.")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        save_tensors(tensors, Path(staging, WEIGHTS_FILE))
        Path(staging, CONFIG_FILE).write_text(config.to_json_string(), encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(staging, name), Path(folder, name))
