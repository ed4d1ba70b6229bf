"""Folders and files that appear whole or not at all, and tensors written file by file; knows bytes, no models."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import AdapterLoadError
from .checkpoint import INDEX_FILE


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its size in bytes, and how to get it when its turn comes."""

    nbytes: int
    read: Callable[[], torch.Tensor]


@contextmanager
def new_folder(target: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """
    Gives a folder to write into, which becomes `target` at the end, or leaves nothing behind if that is not reached.

    Args:
        target (`str` or `os.PathLike`): What there must not be yet, unless it is an empty folder.
        sources (sequence of `str` or `os.PathLike`): What is read from; of these, the folders on this machine must not
            hold `target`.

    Raises:
        [`AdapterLoadError`]: If `target` would overwrite something or lie in a source.
    """
    final = Path(target).resolve()
    for source in sources:
        refuse_inside(target, source)
    if os.path.lexists(target) and not (final.is_dir() and not any(final.iterdir())):
        raise AdapterLoadError(f"{target} is there already, and nothing is overwritten; name a new or empty folder.")
    # Beside the target or above, since a folder is only moved at once within a file system.
    near = next(parent for parent in final.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=near, prefix=".converting-") as staging:
        written = Path(staging, final.name)
        written.mkdir()
        yield written
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir():
            final.rmdir()  # refuses if somebody has put something there meanwhile
        written.rename(final)


def refuse_inside(target: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Raises [`AdapterLoadError`] if `source` is a folder and `target` it or within it."""
    if os.path.isdir(source) and Path(target).resolve().is_relative_to(Path(source).resolve()):
        raise AdapterLoadError(f"{target} lies in {os.fspath(source)}, which is read from; name another folder.")


def write_tensors(
    folder: Path, pieces: Mapping[str, Piece], max_shard_size: int | str, close: Callable[[], None]
) -> None:
    """
    Writes tensors as one safetensors file, or as several with their index, no more than one of them in memory.

    Args:
        folder (`Path`): Where to.
        pieces (mapping of `str` to [`Piece`]): By name, in the order of the files.
        max_shard_size (`int` or `str`): Bytes a file, or such as `"5GB"`; a larger tensor gets a file to itself.
        close (`Callable`): Called after each file, to let go of what was read for it.
    """
    plan = split_state_dict_into_shards_factory(
        dict(pieces),
        get_storage_size=lambda piece: piece.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        save_tensors({name: pieces[name].read() for name in names}, folder / file)
        close()
    if plan.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file; raises `OSError` where it does not fit, as files of other kinds do."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end; if that is not reached, `path` stays as it is."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as staging:
        staged = Path(staging, path.name)
        yield staged
        os.replace(staged, path)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Settings as a file that people can read, too."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
