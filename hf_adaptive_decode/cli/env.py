"""`hf-adaptive-decode env`: versions and hardware for a bug report; knows nothing of where they come from."""

from __future__ import annotations

import argparse

from ..evaluation.provenance import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> dict[str, str]:
    """Prints one line a fact (unless the JSON goes to standard output) and returns them."""
    facts = environment()
    if args.json != "-":
        for name, value in facts.items():
            print(f"{name}: {value}")
    return facts
