"""Where numbers come from: versions, commit, command and hardware; knows no model and no task."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "datasets", "trl", "peft", "vllm")


def environment() -> dict[str, str]:
    """Versions of this library, Python and the packages that matter, the platform and the number of cores."""
    facts = {"hf_adaptive_decode": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return facts | {"cores": str(os.cpu_count())} | versions(_PACKAGES)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package, or that it is not installed, without importing it."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance(**facts: Any) -> dict[str, Any]:
    """
    The line that a file of results begins with.

    Args:
        facts: Whatever else belongs there, of JSON's types.
    """
    import torch

    found = environment()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"machine": found.pop("platform"), "cores": found.pop("cores"), "gpu": gpu}
    return {
        "kind": "provenance",
        "format": 1,
        "library": __version__,
        "versions": found,
        "commit": commit(),
        "command": [without_folders(word) for word in sys.argv],
        "hardware": {**hardware, "threads": torch.get_num_threads()},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: without_folders(value) if isinstance(value, str) else value for name, value in facts.items()},
    }


def without_folders(text: str) -> str:
    """
    A word of a command, or a model's name, with absolute paths cut to their last part.

    Results are made to be published, and where somebody keeps files is nobody else's business.

    Example:
        >>> without_folders("--output=/home/me/results"), without_folders("Qwen/Qwen3-0.6B")
        ('--output=results', 'Qwen/Qwen3-0.6B')
    """
    flag, mark, value = text.rpartition("=")
    return f"{flag}{mark}{Path(value).name}" if Path(value).is_absolute() else text


def commit() -> str | None:
    """The commit of the library's own checkout, with `+changes` if files differ from it; `None` where there is none."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return f"{head}+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
