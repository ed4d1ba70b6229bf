"""Writes what `sample` has kept: rows, provenance and card; knows no flags and samples nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import write_whole

if TYPE_CHECKING:
    from ..evaluation.store import CompletionStore
    from ..training.rejection import Drawn
    from ..training.selection import Selection

ROWS_FILE, PROVENANCE_FILE, CARD_FILE = "train.jsonl", "provenance.json", "README.md"
COMPLETIONS_FILE = Path("sampling", "completions.jsonl")
_MARK = "\n<!-- written by hf_adaptive_decode as "
_OFF = ("temperature", "top_p", "top_k", "min_p")


def training_rows(
    selection: Selection,
    store: CompletionStore,
    problems: Sequence[Mapping[str, Any]],
    ladder: Sequence[Mapping[str, float]],
    tokenizer: Any = None,
) -> Iterator[dict[str, Any]]:
    """
    The kept completions as rows of `prompt`, `completion`, the problem's columns and how it was sampled.

    Args:
        selection ([`Selection`]), store ([`CompletionStore`]): What is kept, and where its text is.
        problems (sequence of mappings): What was sampled for.
        ladder (sequence of mappings): The settings.
        tokenizer (*optional*): Adds `input_ids` and `labels`.
    """
    from ..evaluation.runner import as_answer
    from ..training.rejection import token_row

    for one in selection.kept:
        whole, problem = store.whole(one.run, one.place), problems[one.problem]
        yield {
            "prompt": problem["prompt"],
            "completion": as_answer(problem["prompt"], whole["text"]),
            **{name: value for name, value in problem.items() if name != "prompt"},
            **_of_draw(one, selection.solve_rate[one.problem], ladder[one.rung]),
            **({} if tokenizer is None else token_row(tokenizer, problem["prompt"], whole["token_ids"])),
        }


def _of_draw(one: Drawn, solve_rate: float, settings: Mapping[str, float]) -> dict[str, Any]:
    sampling = {name: settings.get(name) for name in _OFF}
    return {"reward": one.reward, "tokens": one.tokens, "solve_rate": solve_rate, "sampling": sampling}


def write_folder(folder: Path, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]) -> list[str]:
    """
    Writes rows, provenance and card, each whole or not at all, and returns the files. A card that was changed by hand
    stays.

    Args:
        folder (`Path`): Where to.
        rows (iterable of mappings): As [`training_rows`] gives them.
        provenance (mapping): What the card is made from; the rows' digest is added to it.
    """
    from ..hub.dataset_card import dataset_card

    digest = hashlib.sha256()

    def lines() -> Iterator[str]:
        for row in rows:
            line = json.dumps(row) + "\n"
            digest.update(line.encode())
            yield line

    write_whole(folder / ROWS_FILE, lines())
    facts = {**provenance, "sha256": {ROWS_FILE: digest.hexdigest()}}
    write_whole(folder / PROVENANCE_FILE, json.dumps(facts, indent=2) + "\n")
    written = [ROWS_FILE, PROVENANCE_FILE]
    if may_write_card(folder):
        write_whole(folder / CARD_FILE, _marked(dataset_card(provenance)))
        written.append(CARD_FILE)
    return [str(folder / name) for name in written]


def refuse_foreign(folder: Path) -> None:
    """
    Refuses a folder whose rows are not from here, before they are replaced.

    Raises:
        `ValueError`: If there are rows, and neither provenance nor completions beside them.
    """
    if (folder / ROWS_FILE).exists() and not any(
        (folder / one).exists() for one in (PROVENANCE_FILE, COMPLETIONS_FILE)
    ):
        raise ValueError(f"{folder / ROWS_FILE} is there and was not sampled into it; choose another --output.")


def may_write_card(folder: Path) -> bool:
    """Whether there is no card, or one that nobody has changed since it was written."""
    path = folder / CARD_FILE
    if not path.exists():
        return True
    text = path.read_bytes().decode(errors="replace")
    return text == _marked(text.rpartition(_MARK)[0])


def _marked(card: str) -> str:
    """A card with a last line by which it is told from one that was changed, which is to be kept."""
    return f"{card}{_MARK}{hashlib.sha256(card.encode()).hexdigest()} -->\n"
