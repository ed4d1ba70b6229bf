"""`hf-adaptive-decode env`: what a bug report needs, without names, folders or tokens; knows no model and no task."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from ..evaluation.provenance import commit, environment, versions

# Beside those that results name: what extras bring, and what changes how models load.
_MORE = ("tokenizers", "numpy", "evaluate", "math-verify", "matplotlib", "bitsandbytes", "flash-attn", "lm-eval")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE")
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""
    parser.epilog = "A token is never shown, and folders below your home begin with ~."


def run(args: argparse.Namespace) -> dict[str, str]:
    """Prints one line a fact and returns them."""
    facts = environment() | versions(_MORE) | {"commit": commit() or "no checkout"}
    # What is broken is what such a report is for, so it does not end there.
    for part in (_hardware, _accelerators, _hub, _sandbox):
        facts |= _tried(part)
    for name, value in facts.items():
        print(f"{name}: {value}")
    return facts


def _tried(part: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return part()
    except Exception as error:
        return {part.__name__.strip("_"): f"cannot be told: {type(error).__name__}: {_short(str(error))}"}


def _hardware() -> dict[str, str]:
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": _cpu(), "cores of this process": str(may_use)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return facts | {name: os.environ[name] for name in _THREADS if name in os.environ}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _accelerators() -> dict[str, str]:
    import torch

    facts = {"torch threads": f"{torch.get_num_threads()}, and {torch.get_num_interop_threads()} between operations"}
    facts["torch built for CUDA"] = str(torch.version.cuda or torch.version.hip or "no")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        facts["gpu memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    else:
        facts["gpus"] = "mps" if torch.backends.mps.is_available() else "none"
    return facts


def _hub() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    facts = {name: _short(str(vars(constants).get(name) or os.environ.get(name))) for name in _FOLDERS}
    facts |= {name: os.environ.get(name, "not set") for name in _SWITCHES}
    where = urlsplit(constants.ENDPOINT)
    # A password may stand in front of the name.
    facts["HF_ENDPOINT"] = f"{where.scheme}://{where.netloc.rpartition('@')[2]}{where.path}"
    return facts | {"logged in": "yes" if get_token() else "no"}


def _sandbox() -> dict[str, str]:
    from ..rewards.confinement import SandboxUnavailableError, working_sandbox

    try:
        return {"code sandbox": working_sandbox()}
    except SandboxUnavailableError as error:
        return {"code sandbox": f"none: {_short(str(error))}"}


def _short(text: str) -> str:
    """A text without the name of whoever's home it is."""
    for home in sorted({str(Path.home()), os.path.realpath(Path.home())}, key=len, reverse=True):
        if home != os.sep:
            text = text.replace(home, "~")
    return " ".join(text.split())
