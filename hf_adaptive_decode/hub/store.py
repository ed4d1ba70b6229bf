"""An adapter's files: found, checked, read and written; knows policies and the base's shape, nothing of sampling."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..configuration import AutoDecoConfig, read_config
from ..errors import AdapterLoadError
from ..policies import DecodingPolicy, build_policy
from ..tap import output_device, output_embedding_shape
from .bases import fingerprint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# 64 MiB hold the heads of a 30,000 wide model; more is a mistake or an attack.
MAX_WEIGHT_BYTES = 64 << 20
_MAX_HEADER_BYTES = 1 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_COMMIT = re.compile(r"snapshots[/\\]([0-9a-f]{40})[/\\]")


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter's config and weights lie, and the Hub commit they came from (`None` for a folder)."""

    source: str
    config: Path
    weights: Path
    is_remote: bool
    commit: str | None = None


def locate(
    adapter: str | os.PathLike[str],
    subfolder: str = "",
    revision: str | None = None,
    max_weight_bytes: int = MAX_WEIGHT_BYTES,
    **download: Any,
) -> AdapterFiles:
    """
    Finds an adapter's files in a folder, or downloads them from the Hub, all at one commit.

    Args:
        adapter (`str` or `os.PathLike`): Folder or Hub id.
        subfolder (`str`): Folder within it.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        max_weight_bytes (`int`): Larger weights are refused, before they are downloaded.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        [`AdapterLoadError`]: If a file is missing or too large, or the Hub cannot be reached.
    """
    source = os.fspath(adapter)
    folder = Path(source, subfolder)
    if os.path.isdir(source):
        _refuse_missing(source, [path.name for path in folder.iterdir()] if folder.is_dir() else [])
        _refuse_size(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size, max_weight_bytes)
        return AdapterFiles(source, folder / CONFIG_FILE, folder / WEIGHTS_FILE, is_remote=False)
    try:
        config = hf_hub_download(source, CONFIG_FILE, subfolder=subfolder or None, revision=revision, **download)
        found = _COMMIT.search(config)
        commit = found.group(1) if found else revision
        where: dict[str, Any] = {"subfolder": subfolder or None, "revision": commit}
        if not (download.get("local_files_only") or HF_HUB_OFFLINE):
            url = hf_hub_url(source, WEIGHTS_FILE, **where)
            size = get_hf_file_metadata(url, token=download.get("token")).size
            _refuse_size(url, size or 0, max_weight_bytes)
        weights = hf_hub_download(source, WEIGHTS_FILE, **where, **download)
        _refuse_size(weights, os.path.getsize(weights), max_weight_bytes)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, AdapterLoadError):
            raise
        raise AdapterLoadError(
            f"no adapter could be read from {source!r}: it is no folder here, and as a Hub id it gave: {error}"
        ) from error
    return AdapterFiles(source, Path(config), Path(weights), is_remote=True, commit=commit)


def _refuse_missing(source: str, names: list[str]) -> None:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    if not missing:
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    hint = ""
    if WEIGHTS_FILE in missing and pickles:
        hint = (
            f" It holds {', '.join(sorted(pickles))}, which are pickles and never loaded, since unpickling runs code; "
            "save the adapter again as safetensors."
        )
    raise AdapterLoadError(f"{source!r} is no adapter folder: {' and '.join(missing)} missing.{hint}")


def _refuse_size(path: object, size: int, limit: int) -> None:
    if size > limit:
        raise AdapterLoadError(
            f"{path} has {size} bytes, over the limit of {limit} for an adapter; pass `max_weight_bytes={size}` if you "
            "trust it."
        )


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
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise AdapterLoadError(f"{path}: its header names {', '.join(twice)} more than once.")
    return dict(pairs)


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
    config = config or read_config(files.config)
    check_fit(config, model, files.source)
    with torch.device("meta"):
        needed = sum(p.numel() * 4 for p in build_policy(config).parameters())
    limit = hub_kwargs.get("max_weight_bytes", MAX_WEIGHT_BYTES)
    _refuse_size(f"the policy that {files.config} describes", needed, limit)
    policy = build_policy(config)
    load_into(policy, files.weights)
    return policy.to(output_device(model)).eval()


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


def check_fit(config: AutoDecoConfig, model: nn.Module, source: str) -> None:
    """
    Holds an adapter's config against a base model.

    Raises:
        [`AdapterLoadError`]: If their widths or vocabularies differ. Warns if only the architecture's settings do.
    """
    vocab_size, hidden_size = output_embedding_shape(model)
    for name, found, wanted in (
        ("hidden_size", config.hidden_size, hidden_size),
        ("vocab_size", config.vocab_size, vocab_size),
    ):
        if found != wanted:
            raise AdapterLoadError(
                f"the adapter {source!r} was made for a base with {name} {found}, and {type(model).__name__} has "
                f"{wanted}; load it on its own base ({config.base_model_name_or_path!r}) or train one for this model."
            )
    if config.base_fingerprint not in (None, fingerprint(model)):
        warnings.warn(
            f"the adapter {source!r} was trained on {config.base_model_name_or_path!r}; this base has the same shape "
            "but other settings, so its hidden states may mean something else.",
            stacklevel=3,
        )


def save_adapter(policy: DecodingPolicy, config: AutoDecoConfig, folder: str | os.PathLike[str]) -> None:
    """Writes `config.json` and `model.safetensors`; each appears whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    for name, tensor in tensors.items():
        if not math.isfinite(float(tensor.abs().max())):
            raise AdapterLoadError(f"{name} holds NaN or infinite values; the adapter is not worth saving.")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        save_file(tensors, Path(staging, WEIGHTS_FILE), metadata={"format": "pt"})
        Path(staging, CONFIG_FILE).write_text(config.to_json_string(), encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(staging, name), Path(folder, name))


def push_folder(
    folder: str, repo_id: str, token: str | bool | None, private: bool | None, **commit: str | bool | None
) -> str:
    """Uploads an adapter's folder, making the repository if there is none; returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    how = {name: value for name, value in commit.items() if value is not None}
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **cast(dict[str, Any], how)).commit_url)
