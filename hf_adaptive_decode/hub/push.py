"""Adapters on their way to the Hub: whole, in one commit, and kept here if it fails; knows files, no models."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError, safe_open

from ..configuration import AutoDecoConfig
from ..errors import AdapterLoadError, PushError
from .card import CARD_FILE, publish_card
from .causes import CLIENT_ERRORS, why_unsent
from .result_lines import RESULTS_FILE
from .static_setting import STATIC_FILE
from .store import CONFIG_FILE, PEFT_FILES, PEFT_FOLDER, WEIGHTS_FILE, locate, read_policy

_GENERATION_FILE = "generation_config.json"
_CARD_FILES = (CARD_FILE, RESULTS_FILE, STATIC_FILE)
_PEFT = tuple(f"{PEFT_FOLDER}/{name}" for name in PEFT_FILES)
# What transformers' tokenizers save; a glob where the names are the user's.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
MESSAGE = "Upload decoding adapter"


def push_adapter(
    write: Callable[[str], object],
    repo_id: str,
    *,
    card_folder: str | os.PathLike[str] | None = None,
    **how: Any,
) -> str:
    """
    Writes an adapter into a temporary folder and uploads that; if the upload fails, the folder stays.

    Args:
        write (`Callable[[str], object]`): Writes the adapter into the folder of this name.
        repo_id (`str`): Where to; made if it is not there.
        card_folder (`str` or `os.PathLike`, *optional*): Folder whose card and results go along; when `None`, the
            repository's own card is brought up to date.
        how: As for [`push_local`].

    Returns:
        `str`: Address of the commit.

    Raises:
        [`PushError`]: If it could not be written or uploaded.
    """
    folder = tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-")
    try:
        _write(write, folder, card_folder, repo_id)
        address = push_local(folder, repo_id, **how)
    except BaseException as error:
        if not isinstance(error, PushError) or error.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return address


def _write(
    write: Callable[[str], object], folder: str, card_folder: str | os.PathLike[str] | None, repo_id: str
) -> None:
    try:
        write(folder)
        for name in _CARD_FILES:
            Path(folder, name).unlink(missing_ok=True)  # else it would take the place of the repository's
            if card_folder is not None and Path(card_folder, name).exists():
                Path(folder, name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(card_folder, name), Path(folder, name))
    except (OSError, SafetensorError) as error:
        raise PushError(
            f"the adapter could not be written to {folder}, and nothing was sent: {error}. Save it where there is "
            "room, with `model.save_pretrained(FOLDER)`, and then run: hf-adaptive-decode push FOLDER "
            f"{shlex.quote(repo_id)}",
            None,
            repo_id,
        ) from error


def push_local(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = MESSAGE,
) -> str:
    """
    Uploads an adapter's folder in one commit; doing it twice uploads nothing the second time.

    What goes: the adapter's own files, its card and results, a tokenizer and a LoRA in `peft/`, after a check that they
    are whole. Nothing else in the folder does. The folder stays as it is; its card goes along under the repository's
    name, and where it has none the repository's own card is brought up to date.

    Args:
        folder (`str` or `os.PathLike`): The adapter's.
        repo_id (`str`): Where to; made if it is not there.
        token (`str` or `bool`, *optional*): As `huggingface_hub` takes it.
        private (`bool`, *optional*): Whether a new repository is private. `True` is refused for one that is public.
        revision (`str`, *optional*): Branch; made if it is not there.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request instead.
        commit_message (`str`): Its first line.

    Returns:
        `str`: Address of the commit.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: If the folder holds no whole adapter; nothing was sent then.
        [`PushError`]: If the upload failed.
        `ValueError`: If `create_pr` is to change another branch than the main one.
    """
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"`create_pr=True` asks to change the main branch, and `revision` is {revision!r}; pass one.")
    folder = Path(folder)
    config, names = _check(folder)
    try:
        return _upload(folder, names, config, repo_id, token, private, revision, create_pr, commit_message)
    except (*CLIENT_ERRORS, RuntimeError) as error:
        flags = [f"--revision={revision}"] if revision else []
        flags += [flag for flag, on in (("--private", private), ("--create-pr", create_pr)) if on]
        again = shlex.join(["hf-adaptive-decode", "push", str(folder), repo_id, *flags])
        raise PushError(
            f"the adapter did not get to {repo_id!r}: {why_unsent(error, repo_id)} It is kept in {folder}; to send it "
            f"again, run: {again}",
            str(folder),
            repo_id,
        ) from error


def _check(folder: Path) -> tuple[AutoDecoConfig, list[str]]:
    """The config of the adapter in `folder`, if it is whole, and the files to upload."""
    if not folder.is_dir():
        raise AdapterLoadError(f"{str(folder)!r} is no folder; pass the one that an adapter was saved in.")
    files = locate(folder, max_weight_bytes=sys.maxsize, max_peft_bytes=sys.maxsize)
    config = files.read_config()
    if not (config.hidden_size and config.vocab_size):
        raise AdapterLoadError(f"{files.config} says no `hidden_size` or `vocab_size`; save the adapter of a model.")
    read_policy(files, config, sys.maxsize)
    if files.peft is not None:
        _check_peft(files.peft)
    if os.path.isdir(config.base_model_name_or_path or ""):
        warnings.warn(
            f"{files.config} names the folder {config.base_model_name_or_path!r} as its base model; whoever loads the "
            "adapter from the Hub has to pass `base_model=`. Train it on the base's Hub id to spare them that.",
            stacklevel=3,
        )
    own = (CONFIG_FILE, WEIGHTS_FILE, _GENERATION_FILE, *_CARD_FILES, *_PEFT, *_TOKENIZER)
    names = sorted({path.relative_to(folder).as_posix() for name in own for path in folder.glob(name)})
    for name in names:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise AdapterLoadError(
                f"{folder / name} is a link to {target}, outside the folder, and is not uploaded; put a copy in its "
                "place."
            )
    everything = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    left = sorted(name for name in everything - set(names) if not name.startswith("."))
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(f"not uploaded, since it is no part of an adapter: {shown}.", stacklevel=3)
    return config, names


def _check_peft(folder: Path) -> None:
    settings, weights = (folder / name for name in PEFT_FILES)
    try:
        json.loads(settings.read_text(encoding="utf-8"))
        with safe_open(weights, "pt"):
            pass
    except (ValueError, RecursionError, OSError, SafetensorError) as error:
        raise AdapterLoadError(f"the LoRA in {folder} is damaged: {error}. Save the adapter again.") from error


def _upload(
    folder: Path,
    names: list[str],
    config: AutoDecoConfig,
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.model_info(repo_id, revision=revision)
    if private and not there.private:
        raise ValueError(f"{repo_id!r} is public already, and `private=True` was passed. Change that in its settings.")
    with tempfile.TemporaryDirectory() as staging:
        Path(staging, PEFT_FOLDER).mkdir()
        for name in {CONFIG_FILE, WEIGHTS_FILE, _PEFT[0]} & set(names):  # what a card speaks of
            shutil.copyfile(folder / name, Path(staging, name))
        source = folder if (folder / CARD_FILE).exists() else None
        publish_card(staging, config, repo_id, source, token, None if create_pr else revision)
        sent: dict[str, Path] = {name: folder / name for name in names}
        sent |= {name: Path(staging, name) for name in _CARD_FILES if Path(staging, name).exists()}
        # A LoRA of an earlier push would be taken for this adapter's.
        stale = {file.rfilename for file in there.siblings or []} & (set(_PEFT) - set(sent))
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in sent.items()]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        done = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
        return str(done.commit_url)
