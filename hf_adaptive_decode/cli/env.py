"""`hf-adaptive-decode env`: versions and hardware for a bug report; knows package names, imports none of them."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

from .. import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "datasets", "trl", "peft", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> dict[str, str]:
    """Prints one line a fact (unless the JSON goes to standard output) and returns them."""
    facts = environment()
    if args.json != "-":
        for name, value in facts.items():
            print(f"{name}: {value}")
    return facts


def environment() -> dict[str, str]:
    """Versions of this library, Python and the packages that matter, the platform and the number of cores."""
    facts = {"hf_adaptive_decode": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts["cores"] = str(os.cpu_count())
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts
