"""A model's safetensors, in a folder or of one Hub commit, read tensor by tensor; knows names and bytes, no models."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from ..configuration import MAX_CONFIG_BYTES, read_settings
from ..errors import AdapterLoadError
from .causes import CLIENT_ERRORS
from .files import Fetched, Wanted, fetch

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What goes along from folder to folder: what a tokenizer or `generate` reads, and nothing that could be run.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
# The largest models have some MB of either; it is what the Hub's client reads, too.
_MAX_INDEX_BYTES = _MAX_HEADER_BYTES = 25_000_000
_MAX_CARRIED_BYTES = 1 << 28
_ANY_SIZE = 1 << 60
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it: its name, its file's name, its shape, and its size in bytes."""

    name: str
    file: str
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint:
    """
    The settings and tensors of a model's folder, of which no more is read than is asked for.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id.
        subfolder (`str`): Folder within it.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; every file is of the commit that it stands for.
        carried (sequence of `str`): Names among `CARRIED_FILES` to find, too.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Attributes:
        settings (`dict`): What its `config.json` holds.
        carried (`dict` of `str` to `Path`): Those of these files that there are.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: If there is no `config.json`, or the Hub cannot be read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        subfolder: str = "",
        revision: str | None = None,
        carried: Sequence[str] = (),
        **download: Any,
    ) -> None:
        self._subfolder, self._download = subfolder, download
        self._paths: dict[str, Path] = {}
        self._opened: tuple[str, Any] | None = None
        wanted = [Wanted(CONFIG_FILE, MAX_CONFIG_BYTES), Wanted(INDEX_FILE, _MAX_INDEX_BYTES, optional=True)]
        wanted += [Wanted(name, _MAX_CARRIED_BYTES, optional=True) for name in carried]
        self.source, self._revision = os.fspath(source), revision
        found = self._fetch(wanted)
        self._revision = found.commit or revision
        self.folder, self.commit, self.is_remote = found.folder, found.commit, found.is_remote
        self.settings = read_settings(found.paths[CONFIG_FILE])
        self.carried = {name: found.paths[name] for name in carried if name in found.paths}
        self._index_file = found.paths.get(INDEX_FILE)

    @cached_property
    def index(self) -> dict[str, str] | None:
        """File by tensor name, of a sharded checkpoint; raises [`AdapterLoadError`] if its index cannot be used."""
        if self._index_file is None:
            return None
        if not self.is_remote and (self.folder / WEIGHTS_FILE).exists():
            raise AdapterLoadError(f"{self.folder} holds {WEIGHTS_FILE} and {INDEX_FILE}; remove the stale one.")
        return _read_index(self._index_file)

    def has(self, file: str) -> bool:
        """Whether there is such a file of tensors; it is not downloaded."""
        return self._peek(file) is not None

    def names_in(self, file: str) -> set[str]:
        """The names of the tensors in a file, which is not downloaded for that."""
        return self._peek(file) or set()

    def get(self, file: str, max_bytes: int = _ANY_SIZE, override: str | None = None) -> Path:
        """Where a file of tensors lies, once it is downloaded; raises [`AdapterLoadError`] if it may not be read."""
        if file not in self._paths:
            wanted = [Wanted(CONFIG_FILE, MAX_CONFIG_BYTES), Wanted(file, max_bytes, override)]
            self._paths[file] = self._fetch(wanted).paths[file]
        return self._paths[file]

    def header(self, file: str) -> dict[str, StoredTensor]:
        """The tensors of a file by name; raises [`AdapterLoadError`] if the file is damaged."""
        return {t.name: t for t in _read_header(self.get(file), file)}

    def all_tensors(self) -> dict[str, StoredTensor]:
        """
        Every tensor of the checkpoint, in the files' order.

        Raises:
            [`AdapterLoadError`]: If there are no safetensors, or index and files contradict each other; lists how.
        """
        if self.index is None:
            return self.header(WEIGHTS_FILE)
        found: dict[str, StoredTensor] = {}
        problems = []
        for file in sorted(set(self.index.values())):
            header = self.header(file)
            named = {name for name, where in self.index.items() if where == file}
            problems += [f"{name} is missing from {file}" for name in sorted(named - set(header))]
            problems += [f"{name} in {file} is not in the index" for name in sorted(set(header) - named)]
            found |= header
        if problems:
            raise AdapterLoadError(f"{self.source}: index and files differ: {'; '.join(problems)}.")
        return found

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """A tensor; the file it lies in stays open until another is read, or [`~close`]."""
        try:
            if self._opened is None or self._opened[0] != tensor.file:
                self._opened = (tensor.file, safe_open(self.get(tensor.file), framework="pt"))
            found: torch.Tensor = self._opened[1].get_tensor(tensor.name)
        except SafetensorError as error:
            raise AdapterLoadError(f"{tensor.file} of {self.source} is damaged: {error}") from error
        return found

    def close(self) -> None:
        """Closes the file that was read last, with what of it is in memory."""
        self._opened = None

    def _fetch(self, wanted: Sequence[Wanted]) -> Fetched:
        found = fetch(self.source, wanted, subfolder=self._subfolder, revision=self._revision, **self._download)
        if not found.is_remote:
            _refuse_escapes(found.folder, found.paths.values())
        return found

    def _peek(self, file: str) -> set[str] | None:
        """The names in a file's header, from the Hub without the rest of the file; `None` if there is no such file."""
        if not self.is_remote or self._download.get("local_files_only"):
            return set(self.header(file)) if (self.folder / file).is_file() else None
        try:
            name = f"{self._subfolder.strip('/')}/{file}".lstrip("/")
            api = HfApi(token=self._download.get("token"))
            return set(api.parse_safetensors_file_metadata(self.source, name, revision=self.commit).tensors)
        except EntryNotFoundError:
            return None
        except SafetensorsParsingError as error:
            raise AdapterLoadError(f"{file} of {self.source} is damaged or no safetensors file: {error}") from error
        except CLIENT_ERRORS:  # without the Hub the cache may know
            return set(self.header(file)) if (self.folder / file).is_file() else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_bytes())
        files = values["weight_map"]
        names = [*files, *files.values()]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterLoadError(f"{path} is no index of safetensors files: it needs a `weight_map`.") from error
    wrong = [name for name in names if not isinstance(name, str)]
    wrong += [name for name in files.values() if isinstance(name, str) and not _SHARD_NAME.fullmatch(name)]
    if wrong or not files:
        raise AdapterLoadError(
            f"{path} names {wrong[0]!r} as a file; shards lie beside their index and end with .safetensors."
            if wrong
            else f"{path} lists no tensors."
        )
    return dict(files)


def _read_header(path: Path, file: str) -> list[StoredTensor]:
    try:
        with open(path, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            entries = json.loads(opened.read(length), object_pairs_hook=_refuse_twice)
        with safe_open(path, framework="pt") as opened:  # holds offsets, types and the file's length against each other
            names = set(opened.keys())
        entries.pop("__metadata__", None)
        if names != set(entries):
            raise ValueError("its header contradicts itself")
        return [
            StoredTensor(name, file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
        ]
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterLoadError(f"{path} is damaged or no safetensors file: {error}") from error


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"its header names {', '.join(twice)} more than once")
    return found


def _refuse_escapes(folder: Path, paths: Iterable[Path]) -> None:
    """Of a folder on this machine, links out of it; the Hub's own cache is made of links to the blobs beside."""
    root = folder.resolve()
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            allowed.append(parent.parent.parent / "blobs")
    for path in paths:
        real = path.resolve()
        if not any(real.is_relative_to(one) for one in allowed):
            raise AdapterLoadError(f"{path} is a link to {real}, outside of its folder; put a copy of the file there.")
