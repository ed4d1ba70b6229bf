"""Files of a folder or a Hub repository, all of one commit and bounded in size; knows names, nothing of contents."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import RevisionNotFoundError

from ..errors import AdapterLoadError
from .causes import CLIENT_ERRORS, why_unread

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_COMMIT = re.compile(r".*[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


@dataclass(frozen=True)
class Wanted:
    """
    A file to get.

    Attributes:
        name (`str`): Its path within the folder, with forward slashes.
        max_bytes (`int`): A larger one is refused, before it is downloaded.
        override (`str`, *optional*): The caller's argument that raises this limit.
        optional (`bool`, defaults to `False`): Whether it may be missing.
    """

    name: str
    max_bytes: int
    override: str | None = None
    optional: bool = False

    def refuse_size(self, where: object, size: int) -> None:
        """Raises [`AdapterLoadError`] if the file is larger than it may be."""
        if size > self.max_bytes:
            hint = f"; pass `{self.override}={size}` if you trust it" if self.override else ""
            raise AdapterLoadError(f"{where} has {size} bytes, over the limit of {self.max_bytes}{hint}.")


_MODEL_CONFIG = Wanted("config.json", 1 << 24)


@dataclass(frozen=True)
class Fetched:
    """
    Files that were found or downloaded.

    Attributes:
        source (`str`): The folder or Hub id as given.
        folder (`Path`): What the names are relative to.
        paths (`dict` of `str` to `Path`): By name: every required file, and those optional ones that there are.
        commit (`str`, *optional*): The Hub commit that all of them are of; `None` for a folder on this machine.
        is_remote (`bool`): Whether they came from the Hub.
    """

    source: str
    folder: Path
    paths: dict[str, Path]
    commit: str | None
    is_remote: bool


def fetch(
    source: str | os.PathLike[str],
    wanted: Sequence[Wanted],
    *,
    subfolder: str = "",
    revision: str | None = None,
    **download: Any,
) -> Fetched:
    """
    Finds files in a folder, or downloads them from the Hub, all of one commit, however its branches move meanwhile.

    One request asks for the commit and the sizes; what is in the cache already costs no more. Without the Hub (offline,
    or out of reach) the cache alone is read.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id.
        wanted (sequence of [`Wanted`]): The first has to be a required one. They are downloaded in this order: with the
            heaviest last, a cache that holds it holds all the others that there are.
        subfolder (`str`): Folder within the source.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        [`AdapterLoadError`]: If a required file is missing, one is too large, or the Hub gives none; says what to do.
    """
    name = os.fspath(source)
    for what, value in (("subfolder", subfolder), ("revision", revision or "")):
        if ".." in value or value.startswith(("/", "\\")) or ":" in value:
            raise AdapterLoadError(f"`{what}` is {value!r}; it has to lie within {name!r}, without '..'.")
    inside = "/".join(filter(None, subfolder.replace("\\", "/").split("/")))
    if os.path.isdir(name):
        return _from_folder(name, Path(name, inside), wanted)
    try:
        return _from_hub(name, wanted, inside, revision, download)
    except CLIENT_ERRORS as error:
        if isinstance(error, AdapterLoadError):
            raise
        raise AdapterLoadError(
            f"no adapter could be read from {name!r}: it is no folder here, and as a Hub id it gave: "
            f"{why_unread(error, name, revision)}"
        ) from error


def resolve_commit(source: str | os.PathLike[str], revision: str | None = None, **download: Any) -> str | None:
    """
    The commit that a model's branch or tag stands for now, of which its files can then be loaded.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id of a model; its `config.json` is downloaded.
        revision (`str`, *optional*): Branch, tag or commit.
        download: As for [`fetch`], and `subfolder`.

    Returns:
        `str` or `None`: `None` for a folder, or if the Hub and the cache know no such model: loading it will say why.
    """
    subfolder = download.pop("subfolder", "")
    try:
        return fetch(source, [_MODEL_CONFIG], subfolder=subfolder, revision=revision, **download).commit
    except AdapterLoadError:
        return None


def _from_folder(source: str, folder: Path, wanted: Sequence[Wanted]) -> Fetched:
    paths = {file.name: folder / file.name for file in wanted if (folder / file.name).is_file()}
    _refuse_missing(str(folder), wanted, [path.name for path in folder.iterdir()] if folder.is_dir() else [], paths)
    for file in wanted:
        if file.name in paths:
            file.refuse_size(paths[file.name], paths[file.name].stat().st_size)
    return Fetched(source, folder, paths, commit=None, is_remote=False)


def _from_hub(
    source: str, wanted: Sequence[Wanted], inside: str, revision: str | None, download: dict[str, Any]
) -> Fetched:
    # transformers hands on a `str` that says "main" and carries the commit that it has found for that.
    revision = getattr(revision, "resolved", revision)
    if download.get("local_files_only"):
        return _from_cache(source, wanted, inside, revision, download, None)
    try:
        info = HfApi(token=download.get("token")).model_info(
            source, revision=revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT
        )
    except RevisionNotFoundError:
        raise
    except CLIENT_ERRORS as error:
        if download.get("force_download"):
            raise
        return _from_cache(source, wanted, inside, revision, download, error)
    commit = str(info.sha)
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    start = f"{inside}/" if inside else ""
    names = [name.removeprefix(start) for name in sizes if name.startswith(start)]
    _refuse_missing("/".join(filter(None, (source, inside))), wanted, names, names, list(sizes))
    paths: dict[str, Path] = {}
    for file in wanted:
        if file.name not in names:
            continue
        size = sizes[start + file.name]
        if size is None:  # a mirror may list names alone
            url = hf_hub_url(source, start + file.name, revision=commit)
            size = get_hf_file_metadata(url, token=download.get("token")).size
        file.refuse_size(f"{start}{file.name} of {source!r}", size or 0)
        # Not by the branch: the client asks twice, for what a file is and for its content, and may get two commits'.
        path = Path(hf_hub_download(source, start + file.name, revision=commit, **download))
        file.refuse_size(path, path.stat().st_size)
        paths[file.name] = path
    found = _fetched(source, paths, inside, commit)
    _note_branch(found, revision)
    return found


def _note_branch(found: Fetched, revision: str | None) -> None:
    """Writes into the cache what its client would have: the commit of a branch, for when there is no Hub to ask."""
    snapshot = next(folder for folder in (found.folder, *found.folder.parents) if folder.name == found.commit)
    note = snapshot.parents[1] / "refs" / (revision or "main")
    if revision == found.commit or (note.exists() and note.read_text() == found.commit):
        return
    with contextlib.suppress(OSError):  # a cache may be read-only
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(found.commit))


def _from_cache(
    source: str,
    wanted: Sequence[Wanted],
    inside: str,
    revision: str | None,
    download: dict[str, Any],
    error: Exception | None,
) -> Fetched:
    paths: dict[str, Path] = {}
    for file in wanted:
        name = f"{inside}/{file.name}" if inside else file.name
        found = try_to_load_from_cache(source, name, cache_dir=download.get("cache_dir"), revision=revision)
        if isinstance(found, str):
            paths[file.name] = Path(found)
            revision = _commit_of(found)
            file.refuse_size(found, os.path.getsize(found))
        elif not file.optional:
            raise error or FileNotFoundError(f"{name} is not in the cache, and `local_files_only=True` was passed")
    return _fetched(source, paths, inside, str(revision))


def _fetched(source: str, paths: dict[str, Path], inside: str, commit: str) -> Fetched:
    snapshot = next(path for path in next(iter(paths.values())).parents if path.name == commit)
    return Fetched(source, snapshot / inside, paths, commit, is_remote=True)


def _commit_of(path: str | os.PathLike[str]) -> str | None:
    found = _COMMIT.match(os.fspath(path))
    return found.group(1) if found else None


def _refuse_missing(
    where: str,
    wanted: Sequence[Wanted],
    names: Sequence[str],
    found: Sequence[str] | dict[str, Path],
    everywhere: Sequence[str] = (),
) -> None:
    missing = [file.name for file in wanted if not file.optional and file.name not in found]
    if not missing:
        return
    hint = ""
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles and any(name.endswith(".safetensors") for name in missing):
        hint = (
            f" It holds {', '.join(pickles)}, which are pickles and never loaded, since unpickling runs code; save it "
            "again as safetensors."
        )
    elsewhere = sorted({name.removesuffix(f"/{missing[0]}") for name in everywhere if name.endswith(f"/{missing[0]}")})
    if elsewhere:
        hint += f" There is one in {', '.join(elsewhere)}; pass `subfolder={elsewhere[0]!r}`."
    raise AdapterLoadError(f"{where!r} is no adapter folder: {' and '.join(missing)} missing.{hint}")
