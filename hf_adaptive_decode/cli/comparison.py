"""Shows adapters beside every baseline, on the screen, as pictures and in their cards; knows no flag and no metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .pictures import has_pictures, write_gains


def baselines_of(words: Sequence[str] | None) -> Sequence[str]:
    """The baselines that `--baselines` names: the standard ones without it, and for `fair` all that are fair."""
    from ..evaluation import EVERY_FAIR, STANDARD

    return STANDARD if words is None else EVERY_FAIR if list(words) == ["fair"] else words


def update_cards(found: Any, adapters: Mapping[str, Sequence[str | Path]]) -> None:
    """
    Writes results and verdict into the cards of adapters.

    Args:
        found ([`Evaluation`]): What was measured.
        adapters (mapping): By name in the results their folders; what is no folder here is left alone.
    """
    from ..hub.card import add_results

    for name, folders in adapters.items():
        lines = [line for line in found.lines if line["kind"] == "provenance" or line["adapter"] == name]
        for folder in folders:
            if Path(folder).is_dir():
                add_results(folder, lines)


def show(found: Any, size: str, folder: Path) -> None:
    """
    Prints the table and the verdict, and draws the gains if what draws them is installed.

    Args:
        found ([`Evaluation`]): What was measured.
        size (`str`): On how much.
        folder (`Path`): Where the results lie.
    """
    files = write_gains(found.measures, folder) if has_pictures() else []
    print(f"\n{size}; in per cent with 95 % intervals over problems; gains are paired by problem:\n")
    print(f"{found.table()}\n\n{found.summary()}\n\nWritten to {folder}{''.join(f', {file}' for file in files)}.")
