"""Checkpoints as AutoDeco's authors released them, as our settings and tensors; knows files and shapes, no sampling."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from ..configuration import AutoDecoConfig
from ..configuration_checks import fail, is_int, is_released_format
from ..errors import AdapterLoadError
from ..policies import build_policy
from .autodeco_base import BASE_PREFIX, base_config, load_merged_base
from .bases import load_base
from .checkpoint import WEIGHTS_FILE, Checkpoint, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS_FILE = "autodeco_heads.safetensors"
# Our name of each layer of a head by theirs: Linear, ReLU, Linear, sigmoid.
LAYERS = {
    "temp_head.mlp.0.": "temperature_head.up.",
    "temp_head.mlp.2.": "temperature_head.out.",
    "top_p_head.mlp.0.": "top_p_head.up.",
    "top_p_head.mlp.2.": "top_p_head.out.",
}
_ALONG = ("generation_config.json",)  # a merged base's own
_MAX_HEAD_BYTES = 64 << 20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = ["ReleasedCheckpoint", "is_released_format", "load_released", "load_released_base", "locate_released"]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """
    A released checkpoint that was found; of its tensors only the heads' are known.

    Attributes:
        files ([`Checkpoint`]): Where it lies.
        heads (`dict` of `str` to [`StoredTensor`]): The tensors that are not the base's, by their released names.
        is_merged (`bool`): Whether it holds its base model, too.
    """

    files: Checkpoint
    heads: dict[str, StoredTensor]
    is_merged: bool

    @property
    def source(self) -> str:
        """The folder or Hub id as given."""
        return self.files.source

    @property
    def is_remote(self) -> bool:
        """Whether it came from the Hub."""
        return self.files.is_remote

    @property
    def commit(self) -> str | None:
        """The Hub commit that all of its files are of."""
        return self.files.commit


def locate_released(
    source: str | os.PathLike[str],
    subfolder: str = "",
    revision: str | None = None,
    max_weight_bytes: int = _MAX_HEAD_BYTES,
    **download: Any,
) -> ReleasedCheckpoint | None:
    """
    Finds a released checkpoint in a folder or on the Hub; of a base model in it nothing but names is read.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub id.
        subfolder, revision (`str`, *optional*): Where in it.
        max_weight_bytes (`int`): Larger heads are refused, before they are downloaded where they are alone in a file.
        download: `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        [`ReleasedCheckpoint`], or `None` if the `config.json` is no released checkpoint's or there is none.

    Raises:
        [`AdapterLoadError`]: If it is one, and its files are missing, damaged or too large.
    """
    try:
        files = Checkpoint(source, subfolder=subfolder, revision=revision, carried=_ALONG, **download)
    except AdapterLoadError:
        return None  # whoever reads adapters says why
    if not is_released_format(files.settings):
        return None
    return inspect_released(files, max_weight_bytes)


def inspect_released(files: Checkpoint, max_weight_bytes: int = _MAX_HEAD_BYTES) -> ReleasedCheckpoint:
    """What [`locate_released`] does once it knows the format."""
    where = files.index
    if where is None:
        file = HEADS_FILE if files.has(HEADS_FILE) and not files.has(WEIGHTS_FILE) else WEIGHTS_FILE
        where = dict.fromkeys(files.names_in(file), file)
        if not any(name.startswith(BASE_PREFIX) for name in where):
            files.get(file, max_weight_bytes, "max_weight_bytes")
    rest = [name for name in where if not name.startswith(BASE_PREFIX)]
    headers = {file: files.header(file) for file in sorted({where[name] for name in rest})}
    heads = {name: headers[where[name]][name] for name in rest if name in headers[where[name]]}
    size = sum(tensor.nbytes for tensor in heads.values())
    if size > max_weight_bytes:
        raise AdapterLoadError(
            f"the heads in {files.source!r} have {size} bytes, over the limit of {max_weight_bytes}; pass "
            f"`max_weight_bytes={size}` if you trust it."
        )
    return ReleasedCheckpoint(files, heads, is_merged=len(rest) < len(where))


def load_released(
    source: str | os.PathLike[str] | ReleasedCheckpoint,
    subfolder: str = "",
    revision: str | None = None,
    **download: Any,
) -> tuple[AutoDecoConfig, dict[str, torch.Tensor]]:
    """
    The settings and the heads of a released checkpoint, as [`HeadsPolicy`] takes them.

    Args:
        source (`str`, `os.PathLike` or [`ReleasedCheckpoint`]): Folder, Hub id, or what [`locate_released`] found.
        subfolder, revision, download: As for [`locate_released`].

    Returns:
        [`AutoDecoConfig`] and `dict` of `str` to `torch.Tensor`, `torch.float32`: exactly what
        `build_policy(config).load_state_dict` needs.

    Raises:
        [`AdapterLoadError`]: If it is no released checkpoint; or which tensors are missing, unexpected, mis-shaped, no
            floats, or not finite.
        [`AdapterConfigError`]: If a setting is out of range.
    """
    released = source
    if not isinstance(released, ReleasedCheckpoint):
        found = locate_released(released, subfolder, revision, **download)
        if found is None:
            raise AdapterLoadError(
                f"{os.fspath(released)!r} is no released AutoDeco checkpoint: that would have a `config.json` with the "
                "model_type 'autodeco' and the architectures ['AutoDecoModelForCausalLM']."
            )
        released = found
    config = _config(released)
    _refuse_other_tensors(released, config)
    tensors = {
        ours: _finite(released, theirs, released.files.read(released.heads[theirs]))
        for theirs, ours in released_names(config).items()
    }
    released.files.close()
    return config, tensors


def load_released_base(released: ReleasedCheckpoint, **kwargs: Any) -> PreTrainedModel:
    """
    The base model of a released checkpoint: its own one, or for heads alone the one that its config names.

    Args:
        released ([`ReleasedCheckpoint`]): What [`locate_released`] found.
        kwargs: As `AutoModelForCausalLM.from_pretrained` takes them (`dtype`, `device_map`, ...). A base of its own is
            of the checkpoint's commit; those about the Hub hold for a named one.

    Raises:
        [`AdapterLoadError`]: If there is none, or its tensors are not those that its config describes; lists them.
    """
    if released.is_merged:
        return load_merged_base(released.files, set(released.heads), **kwargs)
    name = released.files.settings.get("base_model_name_or_path")
    return load_base(name, released.source, released.is_remote, **kwargs)


def _config(released: ReleasedCheckpoint) -> AutoDecoConfig:
    settings, heads = released.files.settings, released.heads
    flags = {}
    for name in ("enable_temperature_head", "enable_top_p_head", "use_enhanced_features", "detach_temperature"):
        flags[name] = settings.get(name, True)
        if not isinstance(flags[name], bool):
            fail(name, flags[name], "true or false")
    enabled = [ours for ours in ("temperature", "top_p") if flags[f"enable_{ours}_head"]]
    if not enabled:
        raise AdapterLoadError(
            f"{released.source!r} has both of its heads disabled, so there is nothing to decode with."
        )
    statistics = flags["use_enhanced_features"] and "top_p" in enabled
    shapes = {
        name: heads[first].shape
        for name, first in (("temperature", "temp_head.mlp.0.weight"), ("top_p", "top_p_head.mlp.0.weight"))
        if name in enabled and first in heads and len(heads[first].shape) == 2
    }
    widths = {name: shape[0] for name, shape in shapes.items()}
    reads = {shape[1] - (name == "top_p") * (5 if statistics else 1) for name, shape in shapes.items()}
    first = widths.get(enabled[0], 256)
    top_p = widths.get("top_p", first)
    return AutoDecoConfig(
        policy="heads",
        heads=enabled,
        head_hidden_size=first,
        top_p_head_hidden_size=None if top_p == first else top_p,
        top_p_statistics=statistics,
        detach_temperature=flags["detach_temperature"],
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        base_model_revision=settings.get("base_model_revision"),
        base_fingerprint=settings.get("base_fingerprint"),
        hidden_size=_hidden_size(released, reads),
        vocab_size=_size(released, "vocab_size"),
    )


def _hidden_size(released: ReleasedCheckpoint, reads: set[int]) -> int:
    """
    The base's, unless the config says that the heads read another width and they do.

    That is so where the output embedding is narrower than the layers before it.
    """
    said = [released.files.settings.get(f"{name}_hidden_size") for name in ("temperature", "top_p")]
    for value in said:
        if value is not None and not is_int(value, 1, 1 << 24):
            fail("temperature_hidden_size or top_p_hidden_size", value, "a positive whole number below 2^24")
    own = _size(released, "hidden_size")
    return reads.pop() if len(reads) == 1 and reads <= set(said) else own


def _size(released: ReleasedCheckpoint, name: str) -> int:
    value = released.files.settings.get(name)
    if value is None:  # some kinds of model have another word for it, which their config's class translates
        value = getattr(base_config(released.files.settings, released.source).get_text_config(), name, None)
    if not is_int(value, 1, 1 << 24):
        fail(name, value, "a positive whole number below 2^24")
    return int(cast(int, value))


def released_names(config: AutoDecoConfig) -> dict[str, str]:
    """Our name of each tensor of a `"heads"` policy, by its released one."""
    ours = [f"{head}_head." for head in config.heads]
    layers = {theirs: name for theirs, name in LAYERS.items() if name.startswith(tuple(ours))}
    return {f"{theirs}{part}": f"{name}{part}" for theirs, name in layers.items() for part in ("weight", "bias")}


def _refuse_other_tensors(released: ReleasedCheckpoint, config: AutoDecoConfig) -> None:
    with torch.device("meta"):
        wanted = build_policy(config).state_dict()
    names = released_names(config)
    problems = [f"{name} is missing" for name in sorted(set(names) - set(released.heads))]
    for name, tensor in sorted(released.heads.items()):
        if name in names:
            shape = tuple(wanted[names[name]].shape)
            if tensor.shape != shape:
                problems.append(f"{name} has shape {tensor.shape} and should have {shape}")
        elif not name.startswith(tuple(LAYERS)):  # those of a head that is disabled may be there
            problems.append(f"{name} is unexpected")
    if problems:
        raise AdapterLoadError(
            f"{released.source!r} does not hold the heads that its config describes: {'; '.join(problems)}."
        )


def _finite(released: ReleasedCheckpoint, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise AdapterLoadError(f"{released.source!r}: {name} has dtype {tensor.dtype}; a head's tensors are {allowed}.")
    # A copy, since what was read lies in the file as long as it is open.
    found = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(found).all():
        raise AdapterLoadError(f"{released.source!r}: {name} holds NaN or infinite values; the heads are unusable.")
    return found
