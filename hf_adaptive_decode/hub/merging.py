"""Heads and base model put into one checkpoint, and taken out of it again; knows folders, and runs no model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..configuration import AutoDecoConfig, read_settings
from ..configuration_checks import is_int
from ..errors import AdapterLoadError
from ..policies import build_policy
from .autodeco_base import BASE_PREFIX, base_settings
from .autodeco_export import open_base, read_heads, released_settings, trusted_base
from .autodeco_import import ReleasedCheckpoint, inspect_released, is_released_format, load_released
from .card import update_card
from .card_text import TrainingFacts
from .checkpoint import CARRIED_FILES, CONFIG_FILE, Checkpoint
from .static_setting import SPECIAL_TOKENS
from .store import save_adapter
from .writing import Piece, new_folder, refuse_inside, write_json, write_tensors

# The folders that a split checkpoint becomes.
BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"
MAX_SHARD_SIZE = "5GB"
_GENERATION = "generation_config.json"


def merge(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
    base_revision: str | None = None,
    **download: Any,
) -> Path:
    """
    Writes a checkpoint that holds the base model, its tensors under `llm.`, and the heads: AutoDeco's merged layout.

    The base's tensors are copied as they are, file by file; no more than one file that is written is in memory.

    Args:
        adapter (`str` or `os.PathLike`): Folder or Hub id of an adapter, or of a released checkpoint of heads alone.
        base (`str` or `os.PathLike`, *optional*): Folder or Hub id of the base model; the one that the adapter names
            when `None`.
        folder (`str` or `os.PathLike`): A new or empty folder.
        max_shard_size (`int` or `str`): Bytes a file.
        revision, base_revision (`str`, *optional*): Branch, tag or commit of the adapter and of the base model.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        `Path`: The folder.

    Raises:
        [`AdapterConfigError`]: If the released format cannot say what the adapter does.
        [`AdapterLoadError`]: If something is missing, damaged, or does not fit, or `folder` holds something.
    """
    with new_folder(folder, [adapter, *([] if base is None else [base])]) as staging:
        heads = read_heads(adapter, revision, **download)
        opened = open_base(heads, base, base_revision, **download)
        refuse_inside(folder, opened.folder)
        tensors = opened.all_tensors()
        pieces = {
            f"{BASE_PREFIX}{name}": Piece(tensor.nbytes, partial(opened.read, tensor))
            for name, tensor in tensors.items()
        }
        pieces |= _pieces(heads.released_tensors())
        write_tensors(staging, pieces, max_shard_size, opened.close)
        _carry(opened.carried, staging)
        write_json(staging / CONFIG_FILE, released_settings(heads, opened))
    return Path(folder)


def split(
    merged: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
    **download: Any,
) -> tuple[Path, Path]:
    """
    Writes the base model of a merged checkpoint as `folder/base` and its heads as an adapter, `folder/adapter`.

    The base's tensors are copied as they are, under their own names, in the way that [`merge`] copies them.

    Args:
        merged (`str` or `os.PathLike`): Folder or Hub id of the merged checkpoint.
        folder (`str` or `os.PathLike`): A new or empty folder.
        base_name (`str`, *optional*): What the adapter calls its base model; what the checkpoint calls it when `None`,
            and the new folder if that does not.
        base_revision (`str`, *optional*): Branch, tag or commit that goes with this name.
        max_shard_size (`int` or `str`): Bytes a file.
        revision (`str`, *optional*): Branch, tag or commit of the checkpoint.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        `tuple` of two `Path`: The base model's folder and the adapter's.

    Raises:
        [`AdapterLoadError`]: If it is no merged checkpoint, something is missing or damaged, or `folder` holds
            something.
    """
    base_folder, adapter_folder = Path(folder, BASE_FOLDER), Path(folder, ADAPTER_FOLDER)
    with new_folder(folder, [merged]) as staging:
        released = _open_released(merged, revision, download)
        if not released.is_merged:
            raise AdapterLoadError(f"{released.source!r} holds heads alone, so there is no base model to split off.")
        files = released.files
        config, tensors = load_released(released)
        settings = base_settings(files.settings, files.source)
        (staging / BASE_FOLDER).mkdir()
        pieces = {
            name.removeprefix(BASE_PREFIX): Piece(tensor.nbytes, partial(files.read, tensor))
            for name, tensor in files.all_tensors().items()
            if name.startswith(BASE_PREFIX)
        }
        write_tensors(staging / BASE_FOLDER, pieces, max_shard_size, files.close)
        _carry(files.carried, staging / BASE_FOLDER)
        settings |= {"architectures": [_architecture(settings["model_type"])]}
        write_json(staging / BASE_FOLDER / CONFIG_FILE, settings)
        _name_base(config, base_name, base_revision, files.is_remote)
        config.base_model_name_or_path = config.base_model_name_or_path or str(base_folder.resolve())
        _write_adapter(staging / ADAPTER_FOLDER, adapter_folder.name, config, tensors, files)
    return base_folder, adapter_folder


def to_adapter(
    released: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    **download: Any,
) -> Path:
    """
    Writes the heads of a released checkpoint, merged or not, as an adapter of this library.

    Args:
        released (`str` or `os.PathLike`): Folder or Hub id.
        folder (`str` or `os.PathLike`): A new or empty folder.
        base_name (`str`, *optional*): What the adapter calls its base model; what the checkpoint calls it when `None`.
        base_revision (`str`, *optional*): Branch, tag or commit that goes with this name.
        revision (`str`, *optional*): Branch, tag or commit.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        `Path`: The folder.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: As [`load_released`], or if `folder` holds something.
    """
    with new_folder(folder, [released]) as staging:
        found = _open_released(released, revision, download)
        config, tensors = load_released(found)
        _name_base(config, base_name, base_revision, found.is_remote)
        _write_adapter(staging, Path(folder).resolve().name, config, tensors, found.files)
    return Path(folder)


def to_released(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    **download: Any,
) -> Path:
    """
    Writes an adapter's heads in AutoDeco's released format, if that can say what they do; arguments as of [`merge`].

    Of the base model only the settings are read, which stand in the new config beside the heads'.
    """
    with new_folder(folder, [adapter, *([] if base is None else [base])]) as staging:
        heads = read_heads(adapter, revision, **download)
        opened = open_base(heads, base, base_revision, **download)
        refuse_inside(folder, opened.folder)
        write_tensors(staging, _pieces(heads.released_tensors()), MAX_SHARD_SIZE, opened.close)
        _carry({name: path for name, path in opened.carried.items() if name != _GENERATION}, staging)
        write_json(staging / CONFIG_FILE, released_settings(heads, opened))
    return Path(folder)


def _open_released(
    source: str | os.PathLike[str], revision: str | None, download: dict[str, Any]
) -> ReleasedCheckpoint:
    files = Checkpoint(source, revision=revision, carried=CARRIED_FILES, **download)
    if is_released_format(files.settings):
        return inspect_released(files)
    kind = files.settings.get("model_type")
    what = "an adapter of this library" if kind == AutoDecoConfig.model_type else f"a model of type {kind!r}"
    raise AdapterLoadError(f"{files.source!r} is {what}; it has to be a checkpoint in AutoDeco's released format.")


def _name_base(config: AutoDecoConfig, name: str | None, revision: str | None, is_remote: bool) -> None:
    if name is not None:
        config.base_model_name_or_path, config.base_model_revision = name, revision
    else:  # in a folder on this machine nobody would see any more that the Hub has named a path of it
        config.base_model_name_or_path = trusted_base(config, is_remote)


def _pieces(tensors: Mapping[str, torch.Tensor]) -> dict[str, Piece]:
    return {name: Piece(tensor.nbytes, tensor.contiguous) for name, tensor in tensors.items()}


def _carry(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _write_adapter(
    folder: Path, name: str, config: AutoDecoConfig, tensors: dict[str, torch.Tensor], files: Checkpoint
) -> None:
    """What `save_pretrained` of a model with these heads writes, with the tokenizer's files."""
    policy = build_policy(config)
    policy.load_state_dict(tensors)
    save_adapter(policy, config, folder)
    # The latter knows all of several end-of-sequence tokens.
    known = files.settings | (read_settings(files.carried[_GENERATION]) if _GENERATION in files.carried else {})
    tokens = {token: known.get(token) for token in SPECIAL_TOKENS if _are_tokens(known.get(token))}
    GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **tokens).save_pretrained(folder)
    where = files.source if files.is_remote else Path(files.source).resolve().name
    facts = TrainingFacts(data=f"not recorded; converted from the released AutoDeco checkpoint {where}")
    update_card(folder, config, training=facts, name=name)
    _carry({name: path for name, path in files.carried.items() if name != _GENERATION}, folder)


def _are_tokens(value: Any) -> bool:
    return all(is_int(one, 0, 1 << 24) for one in (value if isinstance(value, list) else [value]))


def _architecture(kind: str) -> str:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].__name__)
